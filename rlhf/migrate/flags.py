"""The flags of DeepSpeed-Chat and TRL and what becomes of them: the rows of `flags.yaml`, by peer and step.

`python -m rlhf.migrate docs > docs/migrating.md` writes the page that shows them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
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
    """One flag of one step."""

    name: str
    fate: Fate
    target: Any
    """Settings it sets, the rule that it belongs to, or the reason."""
    kind: str = "text"
    """text, or list, switch or json."""
    default: Any = None
    values: Mapping[str, Any] | None = None
    note: str = ""

    @property
    def settings(self) -> list[str]:
        """Settings that take its value, S. and O. not yet filled in."""
        if self.fate is not Fate.set:
            return []
        return [self.target] if isinstance(self.target, str) else [*self.target]


@dataclass(frozen=True)
class Peer:
    """A project whose users move over."""

    name: str
    steps: Mapping[str, Mapping[str, Flag]]
    """Step -> its flags by name, those of launchers too."""
    constants: Mapping[str, Sequence[Mapping[str, Any]]]
    """Step -> settings that are fixed there, with `set`, `value` and `note`."""
    differs: Mapping[str, Sequence[str]]
    """Step -> what differs, and no setting changes."""
    rows: Mapping[str, int]
    """Rows of the training split of data sets."""
    lists: Mapping[str, Sequence[str]]
    """Data sets about which a rule must know something."""

    def near(self, step: str, name: str) -> str:
        """The flag that a mistyped one may mean, or the step that it is of; empty if there is none."""
        close = difflib.get_close_matches(name, self.steps[step], n=1, cutoff=0.7)
        others = [other for other, flags in self.steps.items() if name in flags]
        return f"did you mean --{close[0]}?" if close else f"it is one of {', '.join(others)}" if others else ""


@cache
def _file() -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: dict[str, Any] = yaml.load(Path(__file__).with_name("flags.yaml").read_text("utf-8"), loader)
    return found


@cache
def peer(name: str) -> Peer:
    """The peer called deepspeed-chat or trl."""
    part, shared = _file()[name], _file()["launcher"]
    steps = [*part["constants"]]
    trained = [step for step in steps if step != "chat"]
    by_step: dict[str, dict[str, Flag]] = {step: {} for step in steps}
    for flag, row in [*_rows(shared), *_rows(part)]:
        for step in row.get("in", steps if flag in dict(_rows(shared)) else trained):
            by_step[step][flag] = _flag(flag, row, step=step)
    known = {"constants", "differs", "rows", "flags", "groups"}
    lists = {key: value for key, value in part.items() if key not in known}
    return Peer(name, by_step, part["constants"], part["differs"], part["rows"], lists)


def _rows(part: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every flag of a part with its row, those of its groups too."""
    rows = [*part.get("flags", {}).items()]
    for group in part["groups"]:
        shared = {key: value for key, value in group.items() if key not in ("flags", "switches")}
        rows += [(flag, shared) for flag in group["flags"]]
        rows += [(flag, shared | {"is": "switch"}) for flag in group.get("switches", ())]
    return rows


def _flag(name: str, row: Mapping[str, Any], *, step: str) -> Flag:
    fate = next(fate for fate in Fate if fate in row)
    default, target = row.get("default"), row[fate]
    default = default.get(step) if isinstance(default, dict) else default
    target = target[step] if isinstance(target, dict) else target
    return Flag(name, fate, target, row.get("is", "text"), default, row.get("values"), row.get("note", ""))


# The documentation.

_WORDS = {Fate.set: "set", Fate.rule: "set", Fate.itself: "by itself", Fate.none: "no counterpart"}


def page(text: str) -> str:
    """`docs/migrating.md` after its introduction `text`: a table of each peer's flags."""
    for name in ("deepspeed-chat", "trl"):
        rows = [_row(flag, row, project=peer(name)) for flag, row in _rows(_file()[name])]
        head = "| flag | steps | their default | here | what |\n|---|---|---|---|---|"
        text += f"\n## {name}\n\n{head}\n" + "\n".join(rows) + "\n"
    return text


def _row(flag: str, row: Mapping[str, Any], *, project: Peer) -> str:
    steps = [step for step, flags in project.steps.items() if flag in flags]
    flags = [project.steps[step][flag] for step in steps]
    settings = dict.fromkeys(setting for own in flags for setting in own.settings)
    named = [setting.replace("S.", "STAGE.").replace("O.", "STAGE.optimizer.") for setting in settings]
    note = row.get("note", "") or ("" if named else str(flags[0].target))
    what = "; ".join(filter(None, [", ".join(f"`{setting}`" for setting in named), note]))
    default = row.get("default", "")
    each = default if isinstance(default, dict) else {}
    shown = ", ".join(f"{step}: {value}" for step, value in each.items()) or default
    return f"| `{flag}` | {' '.join(steps)} | {shown} | {_WORDS[flags[0].fate]} | {what} |"
