"""From a DeepSpeed configuration and a run's own settings to what is to be set, and why.

`resolve` looks up every key in the table: unknown and refused ones end the run, all of them in one message.
`solve_batch` answers for the three batch sizes, which depend on each other and on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rlhf.config.engine_config import EngineConfig
from rlhf.config.optimizer_config import OptimizerConfig
from rlhf.deepspeed.dialects import COMMENTS
from rlhf.deepspeed.keys import CLOSED_SECTIONS, TABLE, WITHOUT_EFFECT, Decision, Key, Path
from rlhf.deepspeed.reader import Document
from rlhf.deepspeed.settings import is_adamw, read_engine, read_optimizer
from rlhf.deepspeed.values import AUTO, Reading, Setting, asks, check, integer, is_refused

TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
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
    for section in TABLE.sections:
        reading.section(".".join(section))
    _check_keys(reading, optimizer)
    read_engine(reading, engine)
    if optimizer is not None:
        read_optimizer(reading, optimizer)
    fates = {path: _fate(document, path) for path in document.written if not _is_decided(reading, path)}
    return Resolved(list(reading.settings.values()), reading.warnings, fates)


def _is_decided(reading: Reading, path: Path) -> bool:
    document = reading.document
    return path not in document.unused and document.renamed.get(path, path) in reading.decided


def _fate(document: Document, written: Path) -> tuple[Fate, str]:
    """What becomes of a value that no setting comes from."""
    if written in document.unused:
        return Fate.ignored, document.unused[written]
    path, value = document.renamed.get(written, written), document.written[written]
    key = TABLE.above(path)
    if any(name.startswith(COMMENTS) for name in path):
        return Fate.ignored, "a comment"
    if key is None and not TABLE.is_section(path):
        return Fate.unread, "neither DeepSpeed nor this run reads it"
    if key is not None and key.decision is Decision.ignored:
        return Fate.ignored, key.note
    if value is None:
        return Fate.no_effect, "null: as if it were not there"
    if value == AUTO:
        return Fate.own, "auto"
    return _without_effect(path, key)


def _without_effect(path: Path, key: Key | None) -> tuple[Fate, str]:
    """Why a value sets nothing that could."""
    if key is not None and key.path in (TRAIN, MICRO, STEPS):
        return Fate.mapped, key.note
    if key is not None and key.decision is Decision.refused:
        return Fate.no_effect, _NOT_ASKED
    reasons = (WITHOUT_EFFECT.get(".".join(path[:depth])) for depth in range(len(path), 0, -1))
    return Fate.no_effect, next(filter(None, reasons), _NOT_ASKED)


def _check_keys(reading: Reading, optimizer: OptimizerConfig | None) -> None:
    """Raise ValueError with everything that is wrong, and warn of keys that nobody reads."""
    problems: list[str] = []
    unknown: list[str] = []
    for path, value in _keys(reading.document.content, (), trains=optimizer is not None):
        key = TABLE.find(path)
        if key is None and ".".join(path[:-1]) not in CLOSED_SECTIONS:
            unknown.append(f"{'.'.join(path)}{TABLE.hint(path)}")
        elif key is None:
            problems.append(f"{reading.document.where(path)}: there is no such key{TABLE.hint(path)}")
        else:
            problems += _problems(reading, path, key=key, value=value, optimizer=optimizer)
    if unknown:
        reading.warnings.append(f"{reading.document.name}: neither DeepSpeed nor this run reads {', '.join(unknown)}")
    if problems:
        raise ValueError("\n".join(problems))


def _problems(reading: Reading, path: Path, *, key: Key, value: Any, optimizer: OptimizerConfig | None) -> list[str]:
    """What is wrong with a value, also where nothing here depends on it."""
    where = reading.document.where
    if key.decision is Decision.refused:
        if not is_refused(key, value) or (path[-1] == "adam_w_mode" and is_adamw(reading, optimizer)):
            return []
        shown = "" if isinstance(value, Mapping) else f"={value!r}"
        return [f"{where(path)}{shown}: cannot be honoured. {key.note[0].upper()}{key.note[1:]}."]
    try:
        if value is not None and value != AUTO:
            check(value, key=key, path=path, where=where)
    except ValueError as error:
        return [str(error)]
    return []


def _keys(part: Mapping[str, Any], parents: Path, *, trains: bool) -> Iterator[tuple[Path, Any]]:
    """Every key that the table decides about, with its value; nothing of a section that is switched off."""
    for name, value in part.items():
        path = (*parents, name)
        if (not trains and path[0] in ("optimizer", "scheduler")) or name.startswith(COMMENTS):
            continue
        if not TABLE.is_section(path):
            yield path, value
        elif isinstance(value, Mapping) and not _says_nothing(path, value, parent=part):
            yield from _keys(value, path, trains=trains)


def _says_nothing(path: Path, section: Mapping[str, Any], *, parent: Mapping[str, Any]) -> bool:
    """Whether a section is switched off, or holds the parameters of an optimizer that is not here."""
    if path == ("data_efficiency",):
        return not asks(section.get("enabled"))
    key = TABLE.find(("optimizer", "type"))
    return path[:-1] == ("optimizer",) and key is not None and is_refused(key, parent.get("type"))


# Batch sizes.


@dataclass(frozen=True)
class Batch:
    """Sequences in an optimizer step of all ranks, and in one forward of one rank."""

    train: int
    micro: int


def solve_batch(document: Document, own: Batch, *, ranks: int, keep: tuple[str, ...] = ()) -> Batch:
    """The sizes of a stage, solved as DeepSpeed solves them.

    A missing size follows from the others by DeepSpeed's rules; `auto` is the run's own, as far as the others leave it
    free. With no number at all, the run's own sizes stand.

    Args:
        document: the configuration, under present names.
        own: the run's sizes.
        ranks: processes.
        keep: of the two sizes, those that are given elsewhere and stand where the file has no number.

    Raises:
        ValueError: the sizes do not add up; with all numbers.
    """
    if not has_numbers(document):
        return own
    raw = {name: document.content.get(name) for name in (TRAIN, MICRO, STEPS)}
    raw |= {name: AUTO for name in keep if raw[name] is None}
    numbers = {name: _size(document, name) for name, value in raw.items() if value not in (None, AUTO)}
    sizes = _solve(numbers, raw, own=own, ranks=ranks, fixed_micro=MICRO in keep)
    steps = numbers.get(STEPS, max(1, sizes.train // (sizes.micro * ranks)) if sizes.micro else 1)
    if sizes.micro < 1 or sizes.train != sizes.micro * steps * ranks:
        raise ValueError(_does_not_add_up(document, numbers, sizes=sizes, steps=steps, ranks=ranks))
    return sizes


def has_numbers(document: Document) -> bool:
    """Whether any of the three sizes is given as a number."""
    return any(document.content.get(name) not in (None, AUTO) for name in (TRAIN, MICRO, STEPS))


def _size(document: Document, name: str) -> int:
    where = document.where((name,))
    size = integer(document.content[name], where=where)
    if size < 1:
        raise ValueError(f"{where}={size}: expected 1 or more.")
    return size


def _solve(numbers: dict[str, int], raw: dict[str, Any], *, own: Batch, ranks: int, fixed_micro: bool) -> Batch:
    train, micro, steps = numbers.get(TRAIN), numbers.get(MICRO), numbers.get(STEPS)
    if train is not None and micro is not None:
        return Batch(train, micro)
    if train is not None:
        if steps is None and AUTO in (raw[MICRO], raw[STEPS]):
            return Batch(train, own.micro if fixed_micro else _largest_that_divides(train // ranks, own.micro))
        return Batch(train, train // ranks // (steps or 1))
    if steps is not None:
        micro = own.micro if micro is None else micro
        return Batch(micro * steps * ranks, micro)
    assert micro is not None, "one of the three is a number"
    return Batch(own.train if AUTO in (raw[TRAIN], raw[STEPS]) else micro * ranks, micro)


def _largest_that_divides(total: int, limit: int) -> int:
    return next((size for size in range(min(limit, total), 0, -1) if total % size == 0), 0)


def _does_not_add_up(document: Document, numbers: dict[str, int], *, sizes: Batch, steps: int, ranks: int) -> str:
    places = ", ".join(f"{name}={size}" for name, size in numbers.items())
    if not sizes.micro:
        return f"{document.name}: {places}: is less than one sequence in each of {steps} x {ranks} (steps x ranks)."
    fitting = sizes.train / (sizes.micro * steps)
    hint = f" These numbers are for launch.ranks={int(fitting)}." if fitting >= 1 and fitting == int(fitting) else ""
    return (
        f"{document.name}: {places}: expected {TRAIN} = {MICRO} x {STEPS} x ranks, found {sizes.train} and "
        f"{sizes.micro} x {steps} x {ranks}.{hint} Leave one of the three out, or write auto, so that it follows."
    )
