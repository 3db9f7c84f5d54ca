"""Reads values as DeepSpeed reads them (5e8 and "3" are whole numbers, "true" and 1 are switches).

`Reading` looks them up in a configuration, and collects the settings that they decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from rlhf.deepspeed.keys import TABLE, Decision, Key, Kind, Path
from rlhf.deepspeed.reader import Document

AUTO = "auto"
_ON = ("true", "on", "yes", "y", "t", "1")
_OFF = ("false", "off", "no", "n", "f", "0")
_TYPES: dict[Kind, tuple[Callable[[Any], bool], str]] = {
    Kind.text: (lambda value: not isinstance(value, Mapping | list), "a text"),
    Kind.folder: (lambda value: isinstance(value, str), "the path of a folder on a local disk"),
    Kind.items: (lambda value: isinstance(value, list | tuple), "a list"),
}
"""Kinds whose values are taken as they are: the test, and what is expected."""


def read(value: Any, kind: Kind, *, where: str, among: tuple[str, ...] = (), least: float = 0) -> Any:
    """`value` as `kind`; a number is at least `least`.

    Raises:
        ValueError: it is something else.
    """
    if kind is Kind.integer:
        return integer(value, where=where, least=least)
    if kind is Kind.number:
        return number(value, where=where, least=least)
    if kind is Kind.switch:
        return switch(value, where=where)
    if kind is Kind.choice:
        return choice(str(value).lower(), among=among, where=where)
    if kind is Kind.section:
        return section(value, where=where)
    if kind in _TYPES and not _TYPES[kind][0](value):
        raise _unfit(value, where, expected=_TYPES[kind][1])
    return value


def check(value: Any, *, key: Key, path: Path, where: Callable[[Path], str]) -> None:
    """Check a value, not null or auto, also where nothing here depends on it.

    Args:
        value: what the file has.
        key: the row that decides about it.
        path: where the value is.
        where: gives the place of a path, for errors.

    Raises:
        ValueError: DeepSpeed would not take it.
    """
    # A number that is ignored may be negative or infinite, as in DeepSpeed.
    least = -math.inf if key.decision is Decision.ignored else 0
    fields = key.fields or {}
    if ".".join(path) != key.path:  # a key in a section that is one row
        read(value, fields.get(path[-1], Kind.other), where=where(path), least=least)
        return
    read(value, key.kind, where=where(path), among=key.among, least=least)
    for name, kind in fields.items():
        if value.get(name) not in (None, AUTO):
            read(value[name], kind, where=where((*path, name)), least=least)


def integer(value: Any, *, where: str, least: float = 0) -> int:
    """A whole number, however it is written, of `least` or more."""
    found = value if isinstance(value, int) and value >= least else number(value, where=where, least=least)
    if isinstance(found, float) and not found.is_integer():
        raise _unfit(value, where, expected="a whole number")
    return int(found)


def number(value: Any, *, where: str, least: float = 0) -> float:
    """A number of `least` or more, finite unless there is no least."""
    try:
        found = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not (found >= least and (math.isfinite(found) or least == -math.inf)):
        raise _unfit(value, where, expected="a number, or auto" if least < 0 else "a number of 0 or more, or auto")
    return found


def switch(value: Any, *, where: str) -> bool:
    """A bool, which may be written as a text or as 1 or 0."""
    word = str(int(value) if isinstance(value, float) and value in (0, 1) else value).lower()
    if word not in _ON + _OFF:
        raise _unfit(value, where, expected="true or false, or auto")
    return word in _ON


def choice(value: Any, *, among: tuple[str, ...], where: str) -> str:
    """One of several words."""
    if value not in among:
        raise _unfit(value, where, expected=", ".join(among))
    return str(value)


def section(value: Any, *, where: str) -> Mapping[str, Any]:
    """An object; null and auto are an empty one."""
    if value is None or value == AUTO:
        return {}
    if not isinstance(value, Mapping):
        raise _unfit(value, where, expected="an object, as in {...}")
    return value


def _unfit(value: Any, where: str, *, expected: str) -> ValueError:
    hint = ""
    if isinstance(value, str) and value.endswith(","):
        hint = " A text without quotes goes to the end of its line, comma included."
    elif isinstance(value, str) and value.lower() in expected.split(", "):
        hint = " Write it in lower case."
    elif isinstance(value, str) and value.isupper():
        hint = " Is it a placeholder that was to be filled in?"
    return ValueError(f"{where}={value!r}: expected {expected}.{hint}")


def is_refused(key: Key, value: Any) -> bool:
    """Whether a value of a refused key asks for what is not here."""
    if value is None or value == AUTO:
        return False
    if key.allowed:
        return value not in key.allowed and str(value).lower() not in {str(word).lower() for word in key.allowed}
    return asks(value)


def asks(value: Any) -> bool:
    """Whether a value asks for anything: a section does unless it is empty or everything in it is switched off."""
    if not isinstance(value, Mapping):
        return bool(value) and value != AUTO and str(value).lower() not in _OFF
    switches = [value[name] for name in ("enabled", "shared_parameters") if name in value]
    if switches:
        return asks(switches[0])
    parts = [part for part in value.values() if isinstance(part, Mapping)]
    return any(map(asks, parts)) if parts else bool(value)


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
    """A configuration under present names, and the settings that have been read from it so far."""

    document: Document
    settings: dict[str, Setting] = field(default_factory=dict)
    """By dotted name."""
    warnings: list[str] = field(default_factory=list)
    decided: set[Path] = field(default_factory=set)
    """Keys that a setting comes from."""

    def section(self, dotted: str) -> dict[str, Any]:
        """The content of a section; empty where it is not there."""
        value: Any = self.document.content
        path = _path(dotted)
        for depth, name in enumerate(path, start=1):
            value = section(value.get(name), where=self.document.where(path[:depth]))
        return dict(value)

    def raw(self, dotted: str) -> Any:
        """The value of a key as it is written, None where it is not there."""
        parent, _, name = dotted.rpartition(".")
        return self.section(parent).get(name)

    def has(self, dotted: str) -> bool:
        """Whether a key or section says anything: it is neither missing nor null nor auto."""
        return self.raw(dotted) not in (None, AUTO)

    def value(self, dotted: str) -> Any:
        """The value of a key by the kind in the table; None where it is not there or auto."""
        raw = self.raw(dotted)
        key = TABLE.find(_path(dotted))
        assert key is not None, dotted
        return None if raw in (None, AUTO) else read(raw, key.kind, where=self.where(dotted), among=key.among)

    def where(self, dotted: str) -> str:
        """Where a key is written, for messages."""
        return self.document.where(_path(dotted))

    def sets(
        self, setting: str, value: Any, *, key: str, also: Iterable[str] = (), origin: Origin = Origin.file
    ) -> None:
        """Note what decides a setting.

        Args:
            setting: dotted name.
            value: what it is set to.
            key: what decides it, dotted.
            also: other keys that count, as far as they are there.
            origin: why.
        """
        paths = [_path(dotted) for dotted in (key, *also)]
        self.decided.update(paths if origin is not Origin.default else [])
        written = dict.fromkeys(place for path in paths for place in self.document.written_at(path))
        more = [".".join(place) for place in written if place in self.document.written]
        first = self.where(key)
        place = ", ".join([first, *(other for other in more if not first.endswith(f": {other}"))])
        group, _, name = setting.partition(".")
        self.settings[setting] = Setting(group, name, value, origin, place)


def _path(dotted: str) -> Path:
    return tuple(dotted.split(".")) if dotted else ()
