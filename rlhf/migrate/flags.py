"""The flags of DeepSpeed-Chat and TRL and what becomes of them: the rows of `flags.yaml`, by peer and step.

`python -m rlhf.migrate docs > docs/migrating.md` writes the page that shows them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml


class Fate(StrEnum):
    """What becomes of a flag."""

    set = "set"
    rule = "rule"
    itself = "itself"
    none = "none"


@dataclass(frozen=True)
class Flag:
    """One flag of one step, or all that fit a pattern such as `ddp_*`."""

    name: str
    fate: Fate
    target: Any
    """Settings it sets, the rule that it belongs to, or the reason."""
    kind: str = "text"
    """text, or list, switch or json."""
    default: Any = None
    values: Mapping[str, Any] | None = None
    otherwise: str = ""
    note: str = ""

    @property
    def settings(self) -> list[str]:
        """Settings that take its value, S. and O. not yet filled in."""
        if self.fate is not Fate.set:
            return []
        return [self.target] if isinstance(self.target, str) else [*self.target]

    def fitting(self, value: Any) -> list[Any]:
        """What the settings take for their value, where None sets nothing; empty if it has no counterpart."""
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        found = [ours for pattern, ours in (self.values or {}).items() if re.fullmatch(pattern, text)]
        return [value if ours == "=" else ours for ours in found[:1]] or ([] if self.otherwise else [value])


@dataclass(frozen=True)
class Peer:
    """A project whose users move over."""

    name: str
    steps: Mapping[str, Mapping[str, Flag]]
    """Step -> its flags by name or pattern, those of launchers too."""
    about: Mapping[str, Any]
    """Besides: by step, `constants` (settings that are fixed there) and what `differs`; and data sets of which a rule
    must know something: `rows`, and lists of names."""

    def flag(self, step: str, name: str) -> Flag | None:
        """The flag of that name; None if neither the table nor a pattern of it knows it."""
        flags = self.steps[step]
        return flags.get(name) or next((flags[key] for key in flags if "*" in key and fnmatchcase(name, key)), None)

    def near(self, step: str, name: str) -> str:
        """The flag that a mistyped one may mean, or the step that it is of; empty if there is none."""
        close = difflib.get_close_matches(name, self.steps[step], n=1, cutoff=0.7)
        others = [other for other, flags in self.steps.items() if name in flags]
        return f" (did you mean --{close[0]}?)" if close else f" (it is one of {', '.join(others)})" if others else ""


@cache
def _file() -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: dict[str, Any] = yaml.load(Path(__file__).with_name("flags.yaml").read_text("utf-8"), loader)
    return found


@cache
def peer(name: str) -> Peer:
    """The peer called deepspeed-chat or trl."""
    about = _file()[name]
    steps = [*about["constants"]]
    by_step: dict[str, dict[str, Flag]] = {step: {} for step in steps}
    for part, usual in ((_file()["launcher"], steps), (about, [step for step in steps if step != "chat"])):
        for flags, row in _rows(part):
            for step in row.get("in", usual):
                by_step[step] |= {flag: _flag(flag, row, step=step) for flag in flags}
    return Peer(name, by_step, about)


def _rows(part: Mapping[str, Any]) -> list[tuple[Sequence[str], dict[str, Any]]]:
    """Flags that share a row, with it."""
    rows: list[tuple[Sequence[str], dict[str, Any]]] = [((flag,), row) for flag, row in part.get("flags", {}).items()]
    for row in part["groups"]:
        rows += [(row.get("flags", ()), row), (row.get("switches", ()), row | {"is": "switch"})]
    return [row for row in rows if row[0]]


def _flag(name: str, row: Mapping[str, Any], *, step: str) -> Flag:
    fate = next(fate for fate in Fate if fate in row)
    default, target = row.get("default"), row[fate]
    default = default.get(step) if isinstance(default, dict) else default
    target = target[step] if isinstance(target, dict) else target
    others = {key: row[key] for key in ("values", "otherwise", "note") if key in row}
    return Flag(name, fate, target, row.get("is", "text"), default, **others)


# The documentation.

_WORDS = {Fate.set: "set", Fate.rule: "set", Fate.itself: "by itself", Fate.none: "no counterpart"}


def page(text: str) -> str:
    """`docs/migrating.md` after its introduction `text`: a table of each peer's flags."""
    for name in ("deepspeed-chat", "trl"):
        about = _file()[name]
        rows = [_row([flag], row, project=peer(name)) for flag, row in about["flags"].items()]
        for row in about["groups"]:
            rows.append(_row([*row.get("flags", ()), *row.get("switches", ())], row, project=peer(name)))
        head = "| flag | steps | their default | here | what |\n|---|---|---|---|---|"
        text += f"\n## {name}\n\n{head}\n" + "\n".join(rows) + "\n"
    return text


def _row(names: Sequence[str], row: Mapping[str, Any], *, project: Peer) -> str:
    trained = [step for step in project.steps if step != "chat"]
    steps = row.get("in", trained)
    flags = [project.steps[step][names[0]] for step in steps]
    settings = dict.fromkeys(setting for own in flags for setting in own.settings)
    named = [f"`{setting.replace('S.', 'STAGE.').replace('O.', 'STAGE.optimizer.')}`" for setting in settings]
    what = "; ".join(filter(None, [", ".join(named), flags[0].note or ("" if named else str(flags[0].target))]))
    default = row.get("default", "")
    shown = ", ".join(f"{step}: {value}" for step, value in default.items()) if isinstance(default, dict) else default
    flag, told = ", ".join(f"`{name}`" for name in names), "all" if [*steps] == trained else " ".join(steps)
    return f"| {flag} | {told} | {shown} | {_WORDS[flags[0].fate]} | {what} |"
