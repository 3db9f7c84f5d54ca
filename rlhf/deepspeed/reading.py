"""A DeepSpeed configuration while it is being read, and what has been read from it so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from rlhf.deepspeed.hjson import Document, Path
from rlhf.deepspeed.key_table import TABLE
from rlhf.deepspeed.values import AUTO, read, section


class Origin(StrEnum):
    """Why a setting has its value."""

    file = "file"
    auto = "auto"
    default = "default"


class Setting(NamedTuple):
    """A setting of this project that a configuration decides."""

    group: str
    """engine or optimizer."""
    name: str
    value: Any
    origin: Origin
    place: str
    """File, line and key."""


@dataclass(frozen=True)
class Reading:
    """Answers questions about a configuration under present names, and collects the settings it decides."""

    document: Document
    settings: dict[tuple[str, str], Setting] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    decided: set[Path] = field(default_factory=set)
    """Keys that a setting comes from."""

    def section(self, dotted: str) -> dict[str, Any]:
        """The content of a section; empty where it is not there."""
        value: Any = self.document.content
        path: Path = tuple(dotted.split(".")) if dotted else ()
        for depth, name in enumerate(path, start=1):
            value = section(value.get(name), where=self.document.where(path[:depth]))
        return dict(value)

    def raw(self, dotted: str) -> Any:
        """The value of a key as it is written, None where it is not there."""
        parent, _, name = dotted.rpartition(".")
        return (self.section(parent) if parent else self.document.content).get(name)

    def value(self, dotted: str) -> Any:
        """The value of a key by the kind in the table; None where it is not there or auto."""
        found = self.raw(dotted)
        if found is None or found == AUTO:
            return None
        key = TABLE.find(tuple(dotted.split(".")))
        assert key is not None, dotted
        return read(found, kind=key.kind, where=self.where(dotted))

    def where(self, dotted: str) -> str:
        """The place of a key, for people."""
        path: Path = tuple(dotted.split("."))
        return self.document.where(path)

    def sets(
        self, setting: str, value: Any, *, key: str, also: Iterable[str] = (), origin: Origin = Origin.file
    ) -> None:
        """Note what decides a setting.

        Args:
            setting: group and name, with a dot between.
            value: what it is set to.
            key: what decides it, dotted.
            also: other keys that have had a say, as far as they are there.
            origin: why.
        """
        group, _, name = setting.partition(".")
        paths: list[Path] = [tuple(dotted.split(".")) for dotted in (key, *also)]
        self.decided.update(paths if origin is not Origin.default else [])
        written = [place for path in paths for place in self.document.written_at(path)]
        more = [".".join(place) for place in dict.fromkeys(written) if place in self.document.written]
        first = self.where(key)
        place = ", ".join([first, *(other for other in more if not first.endswith(f": {other}"))])
        self.settings[group, name] = Setting(group, name, value, origin, place)
