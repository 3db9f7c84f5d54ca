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

_STATM = Path("/proc/self/statm")


class Stopwatch:
    """Adds up the seconds of named phases: `with watch("generate"): ...`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time inside the block to `phase`; the phases of one step may repeat and nest."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                # Kernels run behind Python's back: without waiting, the next phase would pay for this one.
                torch.cuda.synchronize(self._device)
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The metrics `timing_s/PHASE` in seconds since the last call, and start again from nothing."""
        taken = {f"timing_s/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        return taken


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Memory of this process in bytes: resident now (Linux), and the peak of its tensors on a CUDA `device`."""
    readings: dict[str, float] = {}
    if _STATM.exists():
        resident_pages = int(_STATM.read_text().split()[1])
        readings["memory/rss_bytes"] = resident_pages * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        readings["memory/device_bytes"] = torch.cuda.max_memory_allocated(device)
    return readings
