"""Measures where a step's time and memory went. Left out: a profiler (use `torch.profiler`)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rlhf.tracking.peak_memory import METER, Peak, peak_metrics

_STATM = Path("/proc/self/statm")


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
            taken |= peak_metrics(phase, peak)
        self._seconds, self._peaks = {}, {}
        return taken


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Bytes that this process has now: resident memory (Linux), and what PyTorch holds of a CUDA `device`.

    Not CUDA's peak: that restarts with every phase, so a reading between phases would mean nothing.
    """
    readings: dict[str, float] = {}
    if _STATM.exists():
        resident_pages = int(_STATM.read_text().split()[1])
        readings["memory/rss_bytes"] = resident_pages * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        readings["memory/device_bytes"] = torch.cuda.memory_reserved(device)
    return readings
