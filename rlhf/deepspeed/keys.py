"""What becomes of every key of a DeepSpeed configuration: one table decides, and the documentation is made of it.

A key is used (the same setting exists here), mapped (to a setting of another name or shape), ignored (with the reason)
or refused (with what to do instead; only with a value that asks for something). The keys are those of DeepSpeed 0.19,
older names and removed ones that public files still have. Left out: reading values (`values.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rlhf.deepspeed.hjson import Path


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
    choice = "choice"
    items = "items"
    section = "section"
    other = "other"


@dataclass(frozen=True)
class Key:
    """One row of the table."""

    path: str
    """Dotted; `.*` at the end stands for everything below."""
    decision: Decision
    note: str
    """What it does here, or why it does nothing, or why not and what to do instead."""
    setting: str = ""
    """The setting of this project that it sets, where one value goes to one setting."""
    kind: Kind = Kind.other
    default: Any = None
    """DeepSpeed's, where it is worth knowing."""
    old_names: tuple[str, ...] = ()
    """Other names of the last part of the path."""
    allowed: tuple[Any, ...] = ()
    """Values of a refused key that are what happens here anyway."""
    among: tuple[str, ...] = ()
    """The words of a choice, in lower case."""
    fields: Mapping[str, Kind] = field(default_factory=dict)
    """Where one row stands for a section: what is in it, as far as it is checked."""


def used(
    path: str, note: str, *, setting: str, kind: Kind, default: Any = None, old_names: tuple[str, ...] = ()
) -> Key:
    """A key whose value is a setting here."""
    return Key(path, Decision.used, note, setting=setting, kind=kind, default=default, old_names=old_names)


def mapped(
    path: str,
    note: str,
    *,
    setting: str = "",
    kind: Kind = Kind.other,
    default: Any = None,
    old_names: tuple[str, ...] = (),
    among: tuple[str, ...] = (),
) -> Key:
    """A key whose value becomes something else here."""
    kind = Kind.choice if among else kind
    return Key(path, Decision.mapped, note, setting, kind=kind, default=default, old_names=old_names, among=among)


def ignored(
    path: str,
    note: str,
    *,
    default: Any = None,
    kind: Kind | None = None,
    old_names: tuple[str, ...] = (),
    among: tuple[str, ...] = (),
) -> Key:
    """A key that changes nothing here; its value is of the kind of its default, where nothing else is said."""
    kind = kind or (Kind.choice if among else _KINDS.get(type(default), Kind.other))
    return Key(path, Decision.ignored, note, kind=kind, default=default, old_names=old_names, among=among)


def ignored_section(path: str, note: str, **fields: str) -> Key:
    """A section of which nothing changes anything here.

    Args:
        path: dotted, without `.*`.
        note: why.
        fields: names of fields, with spaces between, under the name of the kind that their values have.
    """
    kinds = {name: Kind(kind) for kind, names in fields.items() for name in names.split()}
    return Key(f"{path}.*", Decision.ignored, note, kind=Kind.section, fields={"enabled": Kind.switch} | kinds)


def refused(path: str, note: str, *, allowed: tuple[Any, ...] = (), default: Any = None) -> Key:
    """A key that would change results or break a promise."""
    return Key(path, Decision.refused, note, default=default, allowed=allowed)


_KINDS = {bool: Kind.switch, int: Kind.integer, float: Kind.number}

CLOSED_SECTIONS = (
    "zero_optimization",
    "zero_optimization.offload_param",
    "zero_optimization.offload_optimizer",
    "fp16",
    "bf16",
    "optimizer.params",
    "scheduler.params",
)
"""Where an unknown key is an error, as in DeepSpeed; elsewhere DeepSpeed does not notice, and it is a warning here."""

SECTIONS = (
    "",
    "optimizer",
    "scheduler",
    "activation_checkpointing",
    "aio",
    "data_types",
    "torch_autocast",
    "data_efficiency",
    "tensor_parallel",
    "pipeline",
    *CLOSED_SECTIONS,
)
"""Sections whose keys are looked at one by one; the others are one row each."""


class Table:
    """The rows, to be looked up by path."""

    def __init__(self, keys: tuple[Key, ...]) -> None:
        self.keys = keys
        self._by_path = {_parts(key.path): key for key in keys}
        assert len(self._by_path) == len(keys), "a key is there twice"
        self._present = {(*path[:-1], old): path for path, key in self._by_path.items() for old in key.old_names}
        self._sections = {_parts(section) for section in SECTIONS}

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)

    def canonical(self, path: Path) -> Path:
        """The path under its present name."""
        return self._present.get(path, path)

    def is_section(self, path: Path) -> bool:
        """Whether the keys below it are looked at one by one."""
        return path in self._sections

    def find(self, path: Path) -> Key | None:
        """The row of a canonical path, or the one that stands for all of its section."""
        row = self._by_path.get(path)
        section = self._by_path.get(path[:-1])
        return row or (section if section and section.path.endswith(".*") else None)

    def above(self, path: Path) -> Key | None:
        """The row that decides about a path: its own, or that of the section that it is in."""
        rows = (self.find(path[:depth]) for depth in range(len(path), 0, -1))
        return next((row for row in rows if row), None)

    def near(self, path: Path) -> list[str]:
        """Keys and sections that a misspelt one may mean: of its own section, else the same name in another."""
        *parents, name = path
        everything = [key for key in dict.fromkeys([*self._by_path, *self._present, *self._sections]) if key]
        siblings = sorted({key[-1] for key in everything if [*key[:-1]] == parents} - {name})
        close = [] if "." in name else difflib.get_close_matches(name.lower(), siblings, n=1, cutoff=0.75)
        elsewhere = sorted(".".join(key) for key in everything if key[-1] == name.rpartition(".")[2])
        return [".".join([*parents, key]) for key in close] or elsewhere[:2]


def _parts(dotted: str) -> Path:
    return tuple(dotted.removesuffix(".*").split(".")) if dotted else ()
