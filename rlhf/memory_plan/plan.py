"""What a plan says: bytes by phase, role, part and place, and whether they fit.

See also: how it is made (`planner.py`), and what a run may use (`limits.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Place(StrEnum):
    """Where bytes are."""

    device = "device"
    host = "host"
    disk = "disk"


@dataclass(frozen=True)
class Item:
    """Bytes of one part of one role in one place, on one rank."""

    role: str
    """A model of the stage, or the process itself."""
    part: str
    """What takes the memory, such as gradients."""
    place: Place
    bytes: int


@dataclass(frozen=True)
class Phase:
    """The bytes that are held at the highest moment of a phase."""

    name: str
    items: tuple[Item, ...]

    def total(self, place: Place) -> int:
        """Bytes of one rank."""
        return sum(item.bytes for item in self.items if item.place is place)


@dataclass(frozen=True)
class Limits:
    """Bytes that a plan may use."""

    device: int | None
    """Bytes of each device; None on a CPU, where the host is the device."""
    host: int
    """Bytes of the machine's memory, for all its ranks."""
    disk: int
    """Bytes of the file system, for all its ranks."""

    def by_place(self) -> Iterator[tuple[Place, int]]:
        """Each place that has a limit of its own, and the limit."""
        if self.device is not None:
            yield Place.device, self.device
        yield Place.host, self.host
        yield Place.disk, self.disk


@dataclass(frozen=True)
class Shortage:
    """A phase that needs more than there is."""

    phase: str
    place: Place
    needed: int
    available: int


@dataclass(frozen=True)
class Plan:
    """The memory of one stage."""

    stage: str
    ranks: int
    """Ranks on this machine."""
    is_cuda: bool
    phases: tuple[Phase, ...]

    @property
    def main_place(self) -> Place:
        """The memory that computes: the device's, or on a CPU the host's."""
        return Place.device if self.is_cuda else Place.host

    @property
    def largest(self) -> Phase:
        """The phase that needs most of the memory that computes."""
        return max(self.phases, key=lambda phase: phase.total(self.main_place))

    def needed(self, phase: Phase, place: Place) -> int:
        """Bytes to compare with a limit: of one device, or of all ranks of the machine."""
        return phase.total(place) * (1 if place is Place.device else self.ranks)

    def shortages(self, limits: Limits) -> list[Shortage]:
        """Every phase and place that does not fit, the largest excess first."""
        found = [
            Shortage(phase.name, place, self.needed(phase, place), available)
            for phase in self.phases
            for place, available in limits.by_place()
            if self.needed(phase, place) > available
        ]
        return sorted(found, key=lambda shortage: shortage.available - shortage.needed)
