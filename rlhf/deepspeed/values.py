"""Values of a DeepSpeed configuration, read as DeepSpeed reads them: 5e8 and "3" are whole numbers, "true" is a switch.

Also what a configuration asks for: a section that is switched off asks for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rlhf.deepspeed.hjson import Path
from rlhf.deepspeed.keys import Decision, Key, Kind

AUTO = "auto"
_ON = ("true", "on", "yes", "y", "t", "1")
_OFF = ("false", "off", "no", "n", "f", "0")


def read(value: Any, *, kind: Kind, where: str) -> Any:
    """`value` as `kind`.

    Raises:
        ValueError: it is something else.
    """
    if kind is Kind.integer:
        return integer(value, where=where)
    if kind is Kind.number:
        return number(value, where=where)
    return switch(value, where=where) if kind is Kind.switch else value


def check(value: Any, *, key: Key, where: Callable[[Path], str], path: Path) -> None:
    """Whether a value, not null or auto, is one that DeepSpeed would take, also where nothing here depends on it.

    Args:
        value: what the file has.
        key: the row that decides about it.
        where: gives the place of a path, for errors.
        path: where the value is.

    Raises:
        ValueError: it is not.
    """
    if key.decision is not Decision.ignored and not key.among:
        read(value, kind=key.kind, where=where(path))
        return
    if key.path.endswith(".*") and len(path) > key.path.count("."):  # a field of a section that is one row
        _check(value, kind=key.fields.get(path[-1], Kind.other), where=where(path))
        return
    _check(value, kind=key.kind, where=where(path), among=key.among)
    for name, kind in key.fields.items():
        if value.get(name) not in (None, AUTO):
            _check(value[name], kind=kind, where=where((*path, name)))


def _check(value: Any, *, kind: Kind, where: str, among: tuple[str, ...] = ()) -> None:
    """As DeepSpeed does not use it in vain, a number may be negative or infinite."""
    if kind is Kind.integer:
        integer(value, where=where, least=-math.inf)
    elif kind is Kind.number:
        number(value, where=where, least=-math.inf)
    elif kind is Kind.switch:
        switch(value, where=where)
    elif kind is Kind.choice:
        choice(str(value).lower(), among=among, where=where)
    elif kind is Kind.section:
        section(value, where=where)
    elif kind is Kind.text and isinstance(value, Mapping | list):
        raise _unfit(value, where, expected="a text")
    elif kind is Kind.items and not isinstance(value, list | tuple):
        raise _unfit(value, where, expected="a list")


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
    if "enabled" in value:
        return asks(value["enabled"])
    if "shared_parameters" in value:
        return asks(value["shared_parameters"])
    parts = [part for part in value.values() if isinstance(part, Mapping)]
    return any(map(asks, parts)) if parts else bool(value)
