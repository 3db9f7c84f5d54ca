"""The highest memory of this process while a phase lasts: what the plan is compared with.

The kernel and CUDA keep one highest value per process each, which can be read and started again. Phases nest, so what
is read belongs to every phase that is open. Pages of files (weights that are mapped, libraries) are left out: the
kernel drops them when memory is short. Left out: what a peak is made of (the plan says what it expects).
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
_PEAK_ONLY = "5"  # what this file takes to make the highest resident size start again from the present one


@dataclass
class Peak:
    """Highest bytes of this process."""

    host: int = 0
    """Memory of its own, resident; on a CPU tensors are part of it."""
    device: int = 0
    """Tensors on its CUDA device; 0 on a CPU."""

    def raise_to(self, other: Peak) -> None:
        """Become the highest of both."""
        self.host, self.device = max(self.host, other.host), max(self.device, other.device)


@dataclass
class PeakMeter:
    """Reads the peaks of phases; there is one, `METER`, because there is one highest value."""

    _open: list[Peak] = field(default_factory=list)
    _can_reset: bool = True

    def begin(self, device: torch.device) -> None:
        """A phase begins."""
        self._read(device)
        self._open.append(Peak())

    def end(self, device: torch.device) -> Peak:
        """The phase that began last ends; what it reached."""
        self._read(device)
        return self._open.pop()

    def _read(self, device: torch.device) -> None:
        found = Peak(self._take_host(), _take_device(device))
        for peak in self._open:
            peak.raise_to(found)

    def _take_host(self) -> int:
        if not _STATUS.exists():
            return self._highest_of_all("this system has no /proc")
        status = resident()
        if "VmHWM" not in status:  # in some sandboxes
            return self._highest_of_all(f"{_STATUS} does not tell the highest")
        highest = status["VmHWM"] - status.get("RssFile", 0)
        if self._can_reset:
            try:
                _CLEAR.write_text(_PEAK_ONLY)
            except OSError as error:
                self._cannot(f"{_CLEAR}: {error.strerror}")
        return highest

    def _highest_of_all(self, reason: str) -> int:
        """The highest since the process began."""
        self._cannot(reason)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _cannot(self, reason: str) -> None:
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
