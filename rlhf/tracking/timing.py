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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf.runtime.dist import World, max_over_ranks
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
        self._parts: list[tuple[str, Any, Any]] = []
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

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside the block to `name`, such as `train/actor`: a part of the open phase, without its memory.

        No device sync: on CUDA an event is recorded at both ends, which `take` reads after the phase has waited.
        """
        begun = self._now()
        try:
            yield
        finally:
            self._parts.append((name, begun, self._now()))

    def _now(self) -> Any:
        """The clock in seconds; on CUDA an event in the current stream, which takes its time when work comes to it."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def take(self) -> dict[str, float]:
        """Return the metrics since the last call, and start again.

        These are `timing_s/PHASE` and `timing_s/PHASE/PART` in seconds, and the peak memory of each phase in bytes:
        `memory/PHASE_host_bytes`, and for CUDA tensors `memory/PHASE_device_bytes`.
        """
        for name, begun, ended in self._parts:
            if self._device.type == "cuda":
                ended.synchronize()  # no wait: the phase around it has ended with one
                seconds = begun.elapsed_time(ended) / 1000
            else:
                seconds = ended - begun
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        taken = {f"timing_s/{phase}": seconds for phase, seconds in self._seconds.items()}
        for phase, peak in self._peaks.items():
            taken |= peak.metrics(phase)
        self._seconds, self._peaks, self._parts = {}, {}, []
        return taken


def seconds_by_rank(timing: Mapping[str, float], world: World) -> dict[str, float]:
    """The seconds of the fastest and of the slowest rank in each phase; every rank must call it. Nothing on one rank.

    What the ranks differ by, the fast ones wait at the next collective. A phase that is full of collectives takes all
    of them equally long.
    """
    if world.size == 1:
        return {}
    names = sorted(key.removeprefix("timing_s/") for key in timing if key.startswith("timing_s/"))
    seconds = torch.tensor([timing[f"timing_s/{name}"] for name in names], dtype=torch.float64)
    # One small collective a step, by gloo: the tensor is on the CPU, so no device is waited for.
    highest = max_over_ranks(torch.cat([seconds, -seconds])).tolist()
    slowest, fastest = highest[: len(names)], [-value for value in highest[len(names) :]]
    found = {f"perf/slowest_rank_s/{name}": value for name, value in zip(names, slowest, strict=True)}
    return found | {f"perf/fastest_rank_s/{name}": value for name, value in zip(names, fastest, strict=True)}


def throughput(
    tokens: Mapping[str, float], timing: Mapping[str, float], *, by_rank: Mapping[str, float]
) -> dict[str, float]:
    """Tokens per second of all ranks, of the whole step without evaluating and saving, and of each phase.

    Args:
        tokens: of all ranks, by phase; `step` is the whole step.
        timing: `timing_s/PHASE` of this rank.
        by_rank: what `seconds_by_rank` found: the slowest rank decides.
    """
    found = {}
    for phase, count in tokens.items():
        seconds = by_rank.get(f"perf/slowest_rank_s/{phase}", timing.get(f"timing_s/{phase}", 0.0))
        if phase == "step":
            seconds -= sum(timing.get(f"timing_s/{other}", 0.0) for other in ("evaluate", "save"))
        if seconds > 0:
            found["perf/tokens_per_second" if phase == "step" else f"perf/tokens_per_second/{phase}"] = count / seconds
    return found


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
