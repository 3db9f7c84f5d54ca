"""Values of a DeepSpeed configuration, read as DeepSpeed reads them: 5e8 and "3" are whole numbers, "true" is a switch.

Also what a configuration asks for: a section that is switched off asks for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlhf.engine.deepspeed.keys import Key, Kind

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


def integer(value: Any, *, where: str) -> int:
    """A whole number, however it is written, of zero or more."""
    found = value if isinstance(value, int) and value >= 0 else number(value, where=where)
    if found != int(found):
        raise _unfit(value, where, expected="a whole number")
    return int(found)


def number(value: Any, *, where: str) -> float:
    """A finite number of zero or more."""
    try:
        found = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        found = math.nan
    if not math.isfinite(found) or found < 0:
        raise _unfit(value, where, expected="a number of 0 or more, or auto")
    return found


def switch(value: Any, *, where: str) -> bool:
    """A bool, which may be written as a text or as 1 or 0."""
    word = str(value).lower()
    if word not in _ON + _OFF or isinstance(value, float):
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
