"""From a DeepSpeed configuration and a run's own settings to what is to be set, and why.

Every key is first looked up in the table: unknown and refused ones end the run, all of them in one message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rlhf.config.engine_config import EngineConfig
from rlhf.config.optimizer_config import OptimizerConfig
from rlhf.deepspeed.batch_sizes import MICRO, STEPS, TRAIN
from rlhf.deepspeed.engine_keys import read_engine
from rlhf.deepspeed.foreign import COMMENTS
from rlhf.deepspeed.hjson import Document, Path
from rlhf.deepspeed.key_table import TABLE
from rlhf.deepspeed.keys import CLOSED_SECTIONS, SECTIONS, Decision, Key
from rlhf.deepspeed.optimizer_keys import is_adamw, read_training
from rlhf.deepspeed.reading import Reading, Setting
from rlhf.deepspeed.values import AUTO, asks, check, is_refused

_TRAINING = ("optimizer", "scheduler")
_NO_TYPE = "nothing learns by it: the model is frozen, or the section has no type"
_ON_DISK = "only with device=nvme"
_WITHOUT_EFFECT = {
    "fp16": "fp16 is off",
    "bf16": "it, or bf16, is off",
    "torch_autocast": "off, or bf16 or fp16 decides",
    "optimizer": _NO_TYPE,
    "scheduler": _NO_TYPE,
    "gradient_clipping": "the model is frozen",
    "zero_optimization.sub_group_size": "0 keeps the run's own",
    "zero_optimization.stage3_model_persistence_threshold": "there is no limit on all of them together",
    "zero_optimization.offload_optimizer": _ON_DISK,
    "zero_optimization.offload_param": _ON_DISK,
}
"""Why a key that is used or mapped sets nothing, by section."""
_NOT_ASKED = "asks for what happens here anyway, or for nothing"


class Fate(StrEnum):
    """What becomes of a value that sets nothing; a setting names those that it comes from."""

    mapped = "mapped"
    ignored = "ignored"
    no_effect = "no effect"
    own = "the run's own"
    unread = "not read"


@dataclass(frozen=True)
class Resolved:
    """What a configuration means for one engine."""

    settings: list[Setting]
    ignored: list[Key]
    warnings: list[str]
    fates: dict[Path, tuple[Fate, str]]
    """By the path in the file: every value that no setting comes from, with the reason."""


def resolve(document: Document, engine: EngineConfig, *, optimizer: OptimizerConfig | None) -> Resolved:
    """Decide about every key, except batch sizes.

    Args:
        document: the configuration, under present names.
        engine: the run's own engine.
        optimizer: the run's own optimizer; None for a frozen model, to which optimizer and scheduler mean nothing.

    Raises:
        ValueError: keys that are unknown where DeepSpeed allows none, keys that are refused, values that do not fit.
    """
    reading = Reading(document, warnings=list(document.notes))
    for section in SECTIONS:
        reading.section(section)
    ignored = _check_keys(reading, optimizer)
    read_engine(reading, engine)
    if optimizer is not None:
        read_training(reading, optimizer)
    fates = {path: _fate(reading, path) for path in document.written if not _is_decided(reading, path)}
    return Resolved(list(reading.settings.values()), ignored, reading.warnings, fates)


def _is_decided(reading: Reading, path: Path) -> bool:
    document = reading.document
    return path not in document.idle and document.became.get(path, path) in reading.decided


def _fate(reading: Reading, written: Path) -> tuple[Fate, str]:
    """What becomes of a value that no setting comes from."""
    document = reading.document
    if written in document.idle:
        return Fate.ignored, document.idle[written]
    path, value = document.became.get(written, written), document.written[written]
    if any(name.startswith(COMMENTS) for name in path):
        return Fate.ignored, "a comment"
    key = TABLE.above(path)
    if key is None and not TABLE.is_section(path):
        return Fate.unread, "neither DeepSpeed nor this run reads it"
    if key is not None and key.decision is Decision.ignored:
        return Fate.ignored, key.note
    if value is None:
        return Fate.no_effect, "null: as if it were not there"
    if value == AUTO:
        return Fate.own, "auto"
    if key is not None and key.path in (TRAIN, MICRO, STEPS):
        return Fate.mapped, key.note
    reasons = (_WITHOUT_EFFECT.get(".".join(path[:depth])) for depth in range(len(path), 0, -1))
    is_refused_kind = key is not None and key.decision is Decision.refused
    return Fate.no_effect, _NOT_ASKED if is_refused_kind else next(filter(None, reasons), _NOT_ASKED)


def _check_keys(reading: Reading, optimizer: OptimizerConfig | None) -> list[Key]:
    problems: list[str] = []
    ignored: list[Key] = []
    unknown: list[str] = []
    for path, value in _keys(reading.document.content, (), trains=optimizer is not None):
        key = TABLE.find(path)
        if key is None and ".".join(path[:-1]) not in CLOSED_SECTIONS:
            unknown.append(f"{'.'.join(path)}{_did_you_mean(path)}")
        else:
            problems += _problems(reading, path, key=key, value=value, optimizer=optimizer)
        if key is not None and key.decision is Decision.ignored:
            ignored.append(key)
    if unknown:
        reading.warnings.append(f"{reading.document.name}: neither DeepSpeed nor this run reads {', '.join(unknown)}")
    if problems:
        raise ValueError("\n".join(problems))
    return ignored


def _problems(
    reading: Reading, path: Path, *, key: Key | None, value: Any, optimizer: OptimizerConfig | None
) -> list[str]:
    """What is wrong with a key or its value, also where nothing here depends on it."""
    if key is None:
        return [f"{reading.document.where(path)}: there is no such key{_did_you_mean(path)}"]
    if key.decision is Decision.refused:
        return _refusal(reading, path, key=key, optimizer=optimizer) if is_refused(key, value) else []
    try:
        if value is not None and value != AUTO:
            check(value, key=key, where=reading.document.where, path=path)
    except ValueError as error:
        return [str(error)]
    return []


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
        if (not trains and path[0] in _TRAINING) or name.startswith(COMMENTS):
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
