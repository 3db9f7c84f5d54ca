"""Measures the seconds and the peak memory of each phase of a step.

The kernel and CUDA each keep one peak per process, which can be read and reset. Phases nest, so a peak that is read
counts for every open phase. Pages of files (mapped weights, libraries) do not count: the kernel drops them when memory
is short. Left out: a profiler (use `torch.profiler`), and what a peak consists of (the plan says what it expects).
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rlhf.runtime.process import trim

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

    def metrics(self, phase: str) -> dict[str, float]:
        """The metrics of a phase with this peak."""
        found = {f"memory/{phase}_host_bytes": float(self.host)}
        return found | ({f"memory/{phase}_device_bytes": float(self.device)} if self.device else {})


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
        """Raise every open phase to the highest since the last reading, and start again."""
        found = Peak(self._take_host())
        if device.type == "cuda":
            found.device = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        for peak in self._open:
            peak.raise_to(found)

    def _take_host(self) -> int:
        status = resident()
        if "VmHWM" not in status:
            # Not Linux, or a sandbox: only the peak since the process began is known.
            self._warn_once(f"{_STATUS} does not tell the highest" if status else "this system has no /proc")
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if self._can_reset:
            try:
                _CLEAR.write_text(_PEAK_ONLY)
            except OSError as error:
                self._warn_once(f"{_CLEAR}: {error.strerror}")
        return status["VmHWM"] - status.get("RssFile", 0)

    def _warn_once(self, reason: str) -> None:
        if self._can_reset:
            log.warning("memory peaks are those since the process began, not of each phase (%s)", reason)
        self._can_reset = False


METER = PeakMeter()


class Stopwatch:
    """Adds up the seconds of named phases and notes their peak memory: `with timer("generate"): ...`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, Peak] = {}
        self.highest: dict[str, Peak] = {}
        """Peak memory of each phase since the stopwatch was created."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time inside the block to `phase`; the phases of one step may repeat and nest."""
        if self._device.type == "cpu":
            trim()  # a phase's peak must not contain what earlier phases freed, nor its pages stay for good
        METER.begin(self._device)
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                # Kernels run asynchronously: without this wait, the next phase would be charged for them.
                torch.cuda.synchronize(self._device)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
            peak = METER.end(self._device)
            for peaks in (self._peaks, self.highest):
                peaks.setdefault(phase, Peak()).raise_to(peak)

    def take(self) -> dict[str, float]:
        """Return the metrics since the last call, and start again.

        These are `timing_s/PHASE` in seconds, and the peak memory of each phase in bytes: `memory/PHASE_host_bytes`,
        and for CUDA tensors `memory/PHASE_device_bytes`.
        """
        taken = {f"timing_s/{phase}": seconds for phase, seconds in self._seconds.items()}
        for phase, peak in self._peaks.items():
            taken |= peak.metrics(phase)
        self._seconds, self._peaks = {}, {}
        return taken


def resident() -> dict[str, int]:
    """Bytes of each memory entry of /proc/self/status, such as VmRSS and VmHWM; empty on other systems."""
    if not _STATUS.exists():
        return {}
    lines = [line.split() for line in _STATUS.read_text().splitlines()]
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Bytes that this process has now: resident memory (Linux), and what PyTorch holds of a CUDA `device`.

    Not CUDA's peak: that restarts with every phase, so a reading between phases would mean nothing.
    """
    status = resident()
    readings: dict[str, float] = {"memory/rss_bytes": status["VmRSS"]} if "VmRSS" in status else {}
    if device.type == "cuda":
        readings["memory/device_bytes"] = torch.cuda.memory_reserved(device)
    return readings
