"""Measures the highest memory of this process in each phase, for comparison with the plan.

The kernel and CUDA each keep one peak per process, which can be read and reset. Phases nest, so a peak that is read
counts for every open phase. Pages of files (mapped weights, libraries) do not count: the kernel drops them when memory
is short. Left out: what a peak consists of (the plan says what it expects).
"""

from __future__ import annotations

import logging
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_PEAK_ONLY = "5"  # written to this file, resets the peak to the present resident size


@dataclass
class Peak:
    """Highest bytes of this process."""

    host: int = 0
    """Its own resident memory; on a CPU that includes tensors."""
    device: int = 0
    """Tensors on its CUDA device; 0 on a CPU."""

    def raise_to(self, other: Peak) -> None:
        """Take the higher of both, place by place."""
        self.host, self.device = max(self.host, other.host), max(self.device, other.device)


@dataclass
class PeakMeter:
    """Reads the peaks of phases; there is only one, `METER`, because the process has only one peak."""

    _open: list[Peak] = field(default_factory=list)
    _can_reset: bool = True

    def begin(self, device: torch.device) -> None:
        """A phase begins."""
        self._read(device)
        self._open.append(Peak())

    def end(self, device: torch.device) -> Peak:
        """The phase that began last ends; returns its peak."""
        self._read(device)
        return self._open.pop()

    def _read(self, device: torch.device) -> None:
        found = Peak(self._take_host(), _take_device(device))
        for peak in self._open:
            peak.raise_to(found)

    def _take_host(self) -> int:
        if not _STATUS.exists():
            return self._process_peak("this system has no /proc")
        status = resident()
        if "VmHWM" not in status:  # in some sandboxes
            return self._process_peak(f"{_STATUS} does not tell the highest")
        highest = status["VmHWM"] - status.get("RssFile", 0)
        if self._can_reset:
            try:
                _CLEAR.write_text(_PEAK_ONLY)
            except OSError as error:
                self._warn_once(f"{_CLEAR}: {error.strerror}")
        return highest

    def _process_peak(self, reason: str) -> int:
        """The peak since the process began."""
        self._warn_once(reason)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _warn_once(self, reason: str) -> None:
        if self._can_reset:
            log.warning("memory peaks are those since the process began, not of each phase (%s)", reason)
        self._can_reset = False


METER = PeakMeter()


def peak_metrics(phase: str, peak: Peak) -> dict[str, float]:
    """The metrics of a phase's peak."""
    found = {f"memory/{phase}_host_bytes": float(peak.host)}
    return found | ({f"memory/{phase}_device_bytes": float(peak.device)} if peak.device else {})


def resident() -> dict[str, int]:
    """Bytes of each memory entry of /proc/self/status, such as RssAnon and VmHWM; empty on other systems."""
    if not _STATUS.exists():
        return {}
    lines = [line.split() for line in _STATUS.read_text().splitlines()]
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def _take_device(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    highest = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return highest
