"""From a DeepSpeed configuration and a run's own settings to what is to be set, and why.

Every key is first looked up in the table: unknown and refused ones end the run, all of them in one message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.config import EngineConfig, OptimizerConfig
from rlhf.engine.deepspeed.engine import read_engine
from rlhf.engine.deepspeed.hjson import Document, Path
from rlhf.engine.deepspeed.keys import CLOSED_SECTIONS, SECTIONS, Decision, Key
from rlhf.engine.deepspeed.reading import Reading, Setting
from rlhf.engine.deepspeed.table import TABLE
from rlhf.engine.deepspeed.training import is_adamw, read_training
from rlhf.engine.deepspeed.values import asks, is_refused

_TRAINING = ("optimizer", "scheduler")
_COMMENTS = ("_", "comment", "//", "#")
_FEW = 10


@dataclass(frozen=True)
class Resolved:
    """What a configuration means for one engine."""

    settings: list[Setting]
    ignored: list[Key]
    warnings: list[str]


def resolve(document: Document, engine: EngineConfig, *, optimizer: OptimizerConfig | None) -> Resolved:
    """Decide about every key, except batch sizes.

    Args:
        document: the configuration, under present names.
        engine: the run's own engine.
        optimizer: the run's own optimizer; None for a frozen model, to which optimizer and scheduler mean nothing.

    Raises:
        ValueError: keys that are unknown where DeepSpeed allows none, keys that are refused, values that do not fit.
    """
    reading = Reading(document)
    for section in SECTIONS:
        reading.section(section)
    ignored = _check_keys(reading, optimizer)
    read_engine(reading, engine)
    if optimizer is not None:
        read_training(reading, optimizer)
    return Resolved(list(reading.settings.values()), ignored, reading.warnings)


def _check_keys(reading: Reading, optimizer: OptimizerConfig | None) -> list[Key]:
    problems: list[str] = []
    ignored: list[Key] = []
    unknown: list[str] = []
    for path, value in _keys(reading.document.content, (), trains=optimizer is not None):
        key = TABLE.find(path)
        if key is None and ".".join(path[:-1]) in CLOSED_SECTIONS:
            problems.append(f"{reading.document.where(path)}: there is no such key{_did_you_mean(path)}")
        elif key is None:
            unknown.append(f"{'.'.join(path)}{_did_you_mean(path)}")
        elif key.decision is Decision.refused and is_refused(key, value):
            problems += _refusal(reading, path, key=key, optimizer=optimizer)
        elif key.decision is Decision.ignored:
            ignored.append(key)
    if unknown:
        reading.warnings.append(_unread(reading.document.name, unknown))
    if problems:
        raise ValueError("\n".join(problems))
    return ignored


def _unread(name: str, unknown: list[str]) -> str:
    more = f", and {len(unknown) - _FEW} more" if len(unknown) > _FEW else ""
    return f"{name}: neither DeepSpeed nor this run reads {', '.join(unknown[:_FEW])}{more}"


def _refusal(reading: Reading, path: Path, *, key: Key, optimizer: OptimizerConfig | None) -> list[str]:
    if path[-1] == "adam_w_mode" and is_adamw(reading, optimizer):
        return []
    value = reading.raw(".".join(path))
    shown = "" if isinstance(value, Mapping) else f"={value!r}"
    return [f"{reading.document.where(path)}{shown}: cannot be honoured. {key.note[0].upper()}{key.note[1:]}."]


def _keys(part: Mapping[str, Any], parents: Path, *, trains: bool) -> Iterator[tuple[Path, Any]]:
    """Every key that the table decides about, with its value; nothing of a section that is switched off."""
    for name, value in part.items():
        path = (*parents, name)
        if (not trains and path[0] in _TRAINING) or name.startswith(_COMMENTS):
            continue
        if TABLE.is_section(path):
            if isinstance(value, Mapping) and _is_on(value, path) and not _is_refused_optimizer(parents, part):
                yield from _keys(value, path, trains=trains)
        else:
            yield path, value


def _is_on(value: Mapping[str, Any], path: Path) -> bool:
    return path != ("data_efficiency",) or asks(value.get("enabled"))


def _is_refused_optimizer(parents: Path, part: Mapping[str, Any]) -> bool:
    """The parameters of an optimizer that is not here say nothing more."""
    key = TABLE.find(("optimizer", "type"))
    return parents == ("optimizer",) and key is not None and is_refused(key, part.get("type"))


def _did_you_mean(path: Path) -> str:
    if "." in path[-1]:
        return " (a dot does not nest)"
    near = TABLE.near(path)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
