"""What becomes of every key of a DeepSpeed configuration: the rows of `keys.yaml`, looked up by path and read.

`python -m rlhf.deepspeed.keys > docs/deepspeed.md` writes the page that shows them.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path as FilePath
from typing import Any

import yaml

Path = tuple[str, ...]
"""The names of a key and of the sections it is in, outermost first."""


class Decision(StrEnum):
    """What becomes of a key."""

    used = "used"
    mapped = "mapped"
    ignored = "ignored"
    refused = "refused"


class Kind(StrEnum):
    """How the value of a key is read, or, where it is ignored, checked."""

    integer = "integer"
    number = "number"
    switch = "switch"
    text = "text"
    folder = "folder"
    choice = "choice"
    items = "items"
    section = "section"
    other = "other"


_KINDS = {bool: Kind.switch, int: Kind.integer, float: Kind.number}


@dataclass(frozen=True)
class Key:
    """One row: a key, or a whole section where `fields` is not None."""

    path: str
    """Dotted."""
    decision: Decision
    note: str
    """What the key does here, or why it does nothing, or why not and what to do instead."""
    kind: Kind = Kind.other
    setting: str = ""
    """Dotted setting of this project, where one value goes to one setting."""
    default: Any = None
    """DeepSpeed's, where it is worth knowing."""
    old_names: tuple[str, ...] = ()
    """Other names of the last part of the path."""
    allowed: tuple[Any, ...] = ()
    """Values of a refused key that are what happens here anyway."""
    among: tuple[str, ...] = ()
    """The words of a choice, in lower case."""
    fields: Mapping[str, Kind] | None = None
    """Keys of a whole section, as far as they are checked."""

    @property
    def least(self) -> float:
        """The least number that is taken: any of an ignored key, as in DeepSpeed; else 0, or -1 as its default is."""
        return -math.inf if self.decision is Decision.ignored else -1 if self.default == -1 else 0

    def read(self, value: Any, *, where: str) -> Any:
        """A value of this key: see `read_value`."""
        return read_value(value, self.kind, where=where, among=self.among, least=self.least)

    @classmethod
    def from_row(cls, path: Path, row: Mapping[str, Any]) -> Key:
        """The key that a row of `keys.yaml` describes."""
        decision = next(decision for decision in Decision if decision in row)
        options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
        }
        options |= {"decision": decision, "note": options.pop(decision)}
        by_default = _KINDS.get(type(row.get("default")), Kind.other) if decision is Decision.ignored else Kind.other
        kind = "section" if "fields" in row else "choice" if "among" in row else by_default
        options["kind"] = Kind(row.get("kind", kind))
        if "fields" in row:
            kinds = {name: Kind(kind) for kind, names in row["fields"].items() for name in names}
            options["fields"] = {"enabled": Kind.switch} | kinds
        return cls(".".join(path), **options)


class KeyTable:
    """The rows of a part of `keys.yaml`, to be looked up by path."""

    def __init__(self, rows: Mapping[str, Any]) -> None:
        self.sections: list[Path] = []
        """Sections whose keys are looked at one by one; the others are one row each."""
        self._keys: dict[Path, Key] = {}
        self._add(rows, ())
        self._present = {(*path[:-1], old): path for path, key in self._keys.items() for old in key.old_names}

    def _add(self, rows: Mapping[str, Any], section: Path) -> None:
        self.sections.append(section)
        for name, row in rows.items():
            path = section if name == "*" else (*section, name)
            if any(decision in row for decision in Decision):
                self._keys[path] = Key.from_row(path, row)
            else:
                self._add(row, path)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys.values())

    def canonical(self, path: Path) -> Path:
        """The path under its present name."""
        return self._present.get(path, path)

    def is_section(self, path: Path) -> bool:
        """Whether the keys below it are looked at one by one."""
        return path in self.sections

    def find(self, path: Path) -> Key | None:
        """The row of a path under its present name, or the one that stands for the rest of its section."""
        rest = self._keys.get(path[:-1]) if self.is_section(path[:-1]) else None
        return self._keys.get(path, rest)

    def above(self, path: Path) -> Key | None:
        """The row that decides about a path: its own, or that of the section that it is in."""
        rows = (self.find(path[:depth]) for depth in range(len(path), 0, -1))
        return next((row for row in rows if row), None)

    def knows(self, path: Path) -> bool:
        """Whether a path is a section or there is a row that decides about it."""
        return self.is_section(path) or self.above(path) is not None

    def hint(self, path: Path) -> str:
        """What a misspelt key may mean, in brackets: a key of its own section, else one of its name in another."""
        *parents, name = path
        if "." in name:
            return " (a dot does not nest)"
        everything = [key for key in dict.fromkeys([*self._keys, *self._present, *self.sections]) if key]
        siblings = sorted({key[-1] for key in everything if [*key[:-1]] == parents} - {name})
        close = difflib.get_close_matches(name.lower(), siblings, n=1, cutoff=0.75)
        elsewhere = sorted(".".join(key) for key in everything if key[-1] == name)
        meant = [".".join([*parents, key]) for key in close] or elsewhere[:2]
        return f" (did you mean {' or '.join(meant)}?)" if meant else ""


def _load() -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
    rows: dict[str, Any] = yaml.load(FilePath(__file__).with_name("keys.yaml").read_text("utf-8"), loader)
    return rows


_FILE = _load()
TABLE = KeyTable(_FILE["deepspeed"])
ACCELERATE = KeyTable(_FILE["accelerate"])
CLOSED_SECTIONS: list[str] = _FILE["closed_sections"]
"""Where an unknown key is an error."""
WITHOUT_EFFECT: dict[str, str] = _FILE["without_effect"]
"""Why a key that is used or mapped sets nothing, by key or section."""
INSTEAD_OF_ACCELERATES: dict[str, str] = _FILE["instead_of_accelerates"]
"""What to set instead of a file for another distributed_type of Accelerate."""
TRAINERS: dict[str, list[str]] = _FILE["trainers"]
"""Keys at the top level that only configurations of a trainer have."""
SHARED_WITH_TRAINERS: list[str] = _FILE["shared_with_trainers"]
"""Keys at the top level that DeepSpeed and trainers have."""


# Values.

AUTO = "auto"
_ON, _OFF = ("true", "on", "yes", "y", "t", "1"), ("false", "off", "no", "n", "f", "0")
_TYPES: dict[Kind, tuple[Callable[[Any], bool], str]] = {
    Kind.text: (lambda value: not isinstance(value, Mapping | list), "a text"),
    Kind.folder: (lambda value: isinstance(value, str), "the path of a folder on a local disk"),
    Kind.items: (lambda value: isinstance(value, list | tuple), "a list"),
    Kind.other: (lambda value: True, ""),
}
"""Kinds whose values are taken as they are: the test, and what is expected."""


def read_value(value: Any, kind: Kind, *, where: str, among: tuple[str, ...] = (), least: float = 0) -> Any:
    """`value` as `kind`, by DeepSpeed's rules (5e8 and "3" are whole numbers); a number is at least `least`.

    Raises:
        ValueError: it is something else.
    """
    if kind in (Kind.integer, Kind.number):
        return (integer if kind is Kind.integer else number)(value, where=where, least=least)
    if kind in (Kind.switch, Kind.section):
        return (switch if kind is Kind.switch else section)(value, where=where)
    if kind is Kind.choice:
        return choice(str(value).lower(), among=among, where=where)
    fits, expected = _TYPES[kind]
    if not fits(value):
        raise _unfit(value, where, expected=expected)
    return value


def check_value(value: Any, *, key: Key, path: Path, where: Callable[[Path], str]) -> None:
    """Check a value, not null or auto, also where nothing here depends on it.

    Args:
        value: what the file has.
        key: the row that decides about it.
        path: where the value is.
        where: gives the place of a path, for errors.

    Raises:
        ValueError: DeepSpeed would not take it.
    """
    least = key.least
    fields = key.fields or {}
    if ".".join(path) != key.path:  # a key in a section that is one row
        read_value(value, fields.get(path[-1], Kind.other), where=where(path), least=least)
        return
    read_value(value, key.kind, where=where(path), among=key.among, least=least)
    for name, kind in fields.items():
        if value.get(name) not in (None, AUTO):
            read_value(value[name], kind, where=where((*path, name)), least=least)


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
        raise _unfit(value, where, expected=f"a number{f' of {least} or more' * (least > -math.inf)}, or auto")
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


# The documentation.


def page() -> str:
    """`docs/deepspeed.md`."""
    counts = Counter(key.decision for key in TABLE)
    words: dict[str, Any] = {decision.upper(): count for decision, count in counts.items()}
    words |= {"TOTAL": counts.total(), "CLOSED": ", ".join(f"`{section}`" for section in CLOSED_SECTIONS)}
    words["ACCELERATE"] = ", ".join(f"`{key.path.partition('.')[2]}`" for key in ACCELERATE if key.setting)
    text: str = _FILE["page"]
    for word, value in words.items():
        text = text.replace(f"<{word}>", str(value))
    for section in map(".".join, TABLE.sections):
        rows = [_row(key, section) for key in TABLE if key.path.rpartition(".")[0] == section]
        head = "| key | DeepSpeed's default | here | what it does, or why not |\n|---|---|---|---|"
        text += f"\n## {section or 'top level'}\n\n{head}\n" + "\n".join(rows) + "\n"
    return text


def _row(key: Key, section: str) -> str:
    name = f"`{key.path.removeprefix(f'{section}.')}`" + (" and all in it" if key.fields is not None else "")
    older = f" (also: {', '.join(f'`{old}`' for old in key.old_names)})" if key.old_names else ""
    default = "" if key.default is None else _shown(key.default)
    allowed = f" (allowed: {', '.join(map(_shown, key.allowed))})" if key.allowed else ""
    note = f"{f'`{key.setting}`: ' if key.setting else ''}{key.note}{allowed}".replace("|", "\\|")
    return f"| {name}{older} | {default} | {key.decision} | {note} |"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    sys.stdout.write(page())
