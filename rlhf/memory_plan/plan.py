"""The memory plan of a run: bytes by phase, role and part, on device, host and disk, of one rank.

A *role* is one of the models of a stage (or the process itself); a *part* is what of it takes memory. A *phase* has one
entry for each, at that phase's highest moment. On a CPU the device is the host, and the plan has one number for both.
The predictions are made in `states.py` (arithmetic on shapes) and `trace.py` (the real code on tensors
without values), and joined in `phases.py`. Left out: which models and phases a stage has (`planner.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from rlhf.config.run_config import MemoryConfig


class Place(StrEnum):
    """Where bytes are."""

    device = "device"
    host = "host"
    disk = "disk"


@dataclass(frozen=True)
class Item:
    """Bytes of one part of one role in one place, on one rank."""

    role: str
    part: str
    place: Place
    bytes: int


@dataclass(frozen=True)
class Phase:
    """What is held at the highest moment of a phase."""

    name: str
    items: tuple[Item, ...]

    def total(self, place: Place) -> int:
        """Bytes of one rank."""
        return sum(item.bytes for item in self.items if item.place is place)


@dataclass(frozen=True)
class Limits:
    """Bytes that a plan may use."""

    device: int | None
    """Of each device; None on a CPU, where it is the host."""
    host: int
    """Of the machine, for all its ranks."""
    disk: int
    """Of the file system, for all its ranks."""


@dataclass(frozen=True)
class Shortage:
    """A phase that asks for more than there is."""

    phase: str
    place: Place
    needed: int
    available: int


@dataclass(frozen=True)
class Plan:
    """The memory of one stage."""

    stage: str
    ranks: int
    """Of this machine."""
    is_cuda: bool
    phases: tuple[Phase, ...]

    @property
    def largest(self) -> Phase:
        """The phase that asks most of the device; on a CPU, of the memory."""
        place = Place.device if self.is_cuda else Place.host
        return max(self.phases, key=lambda phase: phase.total(place))

    def needed(self, phase: Phase, place: Place) -> int:
        """Bytes to compare with a limit: of one device, or of all ranks of the machine."""
        return phase.total(place) * (1 if place is Place.device else self.ranks)

    def shortages(self, limits: Limits) -> list[Shortage]:
        """What does not fit, the largest excess first."""
        found = [
            Shortage(phase.name, place, self.needed(phase, place), available)
            for phase in self.phases
            for place, available in _limits_by_place(limits)
            if self.needed(phase, place) > available
        ]
        return sorted(found, key=lambda shortage: shortage.available - shortage.needed)


def _limits_by_place(limits: Limits) -> Iterator[tuple[Place, int]]:
    if limits.device is not None:
        yield Place.device, limits.device
    yield Place.host, limits.host
    yield Place.disk, limits.disk


ALLOCATOR = "allocator"
_CPU_SLACK, _CUDA_SLACK = 0.25, 0.1


def with_allowance(items: Iterable[Item], *, is_cuda: bool, moving: Collection[str]) -> tuple[Item, ...]:
    """The items of a phase, and what an allocator loses between tensors that come and go.

    On a CPU a quarter of them, as measured with glibc 2.36 (benchmarks/results/plan.md); on CUDA a tenth, which nobody
    has measured here. The same for every configuration.

    Args:
        items: of the phase.
        is_cuda: which allocator it is.
        moving: parts whose tensors come and go.
    """
    items = tuple(items)
    count = sum(item.bytes for item in items if item.place is Place.device and item.part in moving)
    slack = int((_CUDA_SLACK if is_cuda else _CPU_SLACK) * count)
    return (*items, Item("process", ALLOCATOR, Place.device, slack))


def on_one_memory(items: Iterable[Item]) -> tuple[Item, ...]:
    """The items of a CPU machine: what is on the device is in the host's memory."""
    return tuple(
        Item(item.role, item.part, Place.host if item.place is Place.device else item.place, item.bytes)
        for item in items
    )


def chosen_limits(config: MemoryConfig, found: Limits) -> Limits:
    """What the configuration allows, and where it is silent what the machine has."""

    def bytes_of(gigabytes: float | None, otherwise: int) -> int:
        return otherwise if gigabytes is None else int(gigabytes * 1e9)

    device = found.device if found.device is None else bytes_of(config.device_gb, found.device)
    host = bytes_of(config.host_gb, found.host)
    if found.device is None and config.device_gb is not None:  # the CPU is the device
        host = min(host, int(config.device_gb * 1e9))
    return Limits(device, host, bytes_of(config.disk_gb, found.disk))
