"""Where a step's time and memory went.

Left out: a profiler (use `torch.profiler`).
"""

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
    """Adds up the seconds of named phases, and notes their highest memory: `with timer("generate"): ...`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, Peak] = {}
        self.highest: dict[str, Peak] = {}
        """Of each phase since the stopwatch was made."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time inside the block to `phase`; the phases of one step may repeat and nest."""
        METER.begin(self._device)
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                # Kernels run behind Python's back: without waiting, the next phase would pay for this one.
                torch.cuda.synchronize(self._device)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
            peak = METER.end(self._device)
            for peaks in (self._peaks, self.highest):
                peaks.setdefault(phase, Peak()).raise_to(peak)

    def take(self) -> dict[str, float]:
        """The metrics `timing_s/PHASE` in seconds since the last call, and start again from nothing.

        With them the highest memory of each phase in bytes: `memory/PHASE_host_bytes`, and of CUDA's tensors
        `memory/PHASE_device_bytes`.
        """
        taken = {f"timing_s/{phase}": seconds for phase, seconds in self._seconds.items()}
        for phase, peak in self._peaks.items():
            taken |= peak_metrics(phase, peak)
        self._seconds, self._peaks = {}, {}
        return taken


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Memory of this process in bytes: resident now (Linux), and what PyTorch holds now of a CUDA `device`.

    Phases have the peaks of tensors; after a phase, CUDA's own highest value begins again.
    """
    readings: dict[str, float] = {}
    if _STATM.exists():
        resident_pages = int(_STATM.read_text().split()[1])
        readings["memory/rss_bytes"] = resident_pages * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        readings["memory/device_bytes"] = torch.cuda.memory_reserved(device)
    return readings
