"""DeepSpeed configurations become settings of the run, once, before anything else looks at them.

`engine.deepspeed` reaches every stage and model, and each can have its own (`ppo.critic_engine.deepspeed`). What the
file says replaces YAML; what the command line says stands, and where the two contradict each other the run ends.
Afterwards `deepspeed` is null everywhere, and `config.yaml` holds the settings themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from rlhf.config.engine_config import EngineConfig
from rlhf.config.roles import Role, all_roles
from rlhf.config.run_config import RunConfig
from rlhf.config.stage_configs import OptimizerConfig, StageConfig
from rlhf.deepspeed.arithmetic import MICRO, SHAPES, STEPS, TRAIN, Batch, deepspeed_schedule, has_numbers, solve_batch
from rlhf.deepspeed.dialects import COMMENTS, read_deepspeed
from rlhf.deepspeed.keys import (
    AUTO,
    CLOSED_SECTIONS,
    TABLE,
    WITHOUT_EFFECT,
    Decision,
    Key,
    Path,
    asks,
    check_value,
    is_refused,
)
from rlhf.deepspeed.reader import Document
from rlhf.deepspeed.settings import SCHEDULES, Origin, Reading, Setting, is_adamw, read_engine, read_optimizer

log = logging.getLogger(__name__)

_Group = TypeVar("_Group", EngineConfig, OptimizerConfig, StageConfig)


def with_deepspeed(run: RunConfig, *, ranks: int, overridden: Collection[str] = ()) -> RunConfig:
    """The run with every `deepspeed` replaced by the settings it stands for; logs which, and where they come from.

    Args:
        run: the run as composed.
        ranks: processes it will have.
        overridden: dotted names that the command line sets.

    Raises:
        ValueError: a file that cannot be read, a key that is unknown or refused, sizes that do not add up, or a setting
            that the command line sets otherwise.
    """
    files = _Files(run, ranks, overridden)
    stages: dict[str, Any] = {stage: files.stage(stage) for stage in (*run.stages, *run.uses)}
    engine = run.engine
    if engine.deepspeed is not None:
        reading = resolve(read_deepspeed(engine.deepspeed, setting="engine.deepspeed"), engine, optimizer=None)
        engine, _ = files.applied(reading, engine, group="engine", names=("engine",), place="engine.deepspeed")
    files.report.log()
    run = replace(run, engine=engine, **stages)
    _check_schedules(run)
    return run


class _Files:
    """Applies the DeepSpeed files of a run to its stages."""

    def __init__(self, run: RunConfig, ranks: int, overridden: Collection[str]) -> None:
        self.run, self.ranks, self.overridden = run, ranks, overridden
        self.report = ConfigurationReport()

    def stage(self, stage: str) -> StageConfig:
        """The settings of a stage with those that the files of its models decide."""
        run = self.run
        roles: dict[str, Role] = {}
        for role in all_roles(run, stage):
            roles.setdefault(role.engine, role)  # roles that share an engine share its file
        changes: dict[str, Any] = {}
        for role in roles.values():
            if role.engine_config(run).deepspeed is not None:
                label = f"{run.title(stage)} {role.name}" if len(roles) > 1 else run.title(stage)
                new = self._role(role, label=label)
                _check_same_batch(new, changes, role=role)
                changes |= new
        place = f"{stage}.engine.deepspeed"
        if any(role.is_trained for role in roles.values()):
            place += f"; train_batch_size is {stage}.{run.training_config(stage).batch_setting}"
        return _replaced(run.stage_config(stage), changes, place=place)

    def _role(self, role: Role, *, label: str) -> dict[str, Any]:
        """The stage's settings that one model's file decides."""
        engine, optimizer = role.engine_config(self.run), role.optimizer_config(self.run)
        place = self._given_as(role)
        document = read_deepspeed(engine.deepspeed, setting=place)
        reading = resolve(document, engine, optimizer=optimizer)
        engines = (f"{role.stage}.{role.engine}", f"{role.stage}.engine", "engine")
        engine, chosen = self.applied(reading, engine, group="engine", names=engines, place=place)
        new: dict[str, Any] = {role.engine: engine}
        if role.optimizer is not None and optimizer is not None:
            names = [f"{role.stage}.{role.optimizer}"]
            optimizer, more = self.applied(reading, optimizer, group="optimizer", names=names, place=place)
            new |= {role.optimizer: optimizer} | self._batch(role.stage, document)
            chosen |= more
        self.report.add(reading, chosen, place=label)
        return new

    def _given_as(self, role: Role) -> str:
        """The most general setting that names the file of a model: probably the one that was written."""
        file = role.engine_config(self.run).deepspeed
        if file == self.run.engine.deepspeed:
            return "engine.deepspeed"
        is_the_stages = file == self.run.stage_config(role.stage).engine.deepspeed
        return f"{role.stage}.{'engine' if is_the_stages else role.engine}.deepspeed"

    def applied(
        self, reading: Reading, own: _Group, *, group: str, names: Collection[str], place: str
    ) -> tuple[_Group, dict[str, Setting]]:
        """`own` with the settings of its group, and those settings; on the command line the group has one of `names`.

        Raises:
            ValueError: the command line says something else, or the settings do not fit each other.
        """
        chosen: dict[str, Setting] = {}
        for dotted, setting in reading.settings.items():
            kind, _, name = dotted.partition(".")
            words = [word for prefix in names if (word := f"{prefix}.{name}") in self.overridden]
            if kind != group or (words and setting.origin is Origin.default):
                continue  # a default of DeepSpeed's yields to the command line
            if words and getattr(own, name) != setting.value and setting.origin is Origin.file:
                raise ValueError(
                    f"{words[0]}={getattr(own, name)} on the command line, but {setting.value} by {setting.place}; "
                    f"expected one of the two. Drop the word on the command line, or the key in the file."
                )
            chosen[dotted] = setting
        values = {dotted.partition(".")[2]: setting.value for dotted, setting in chosen.items()}
        return _replaced(own, values | ({"deepspeed": None} if group == "engine" else {}), place=place), chosen

    def _batch(self, stage: str, document: Document) -> dict[str, int]:
        """The stage's two batch sizes, where the file has a number for any."""
        if not has_numbers(document):
            return {}
        config = self.run.training_config(stage)
        names = {TRAIN: config.batch_setting, MICRO: "micro_batch_size"}
        own = Batch(config.batch_size, config.micro_batch_size)
        keep = tuple(key for key, name in names.items() if f"{stage}.{name}" in self.overridden)
        solved = solve_batch(document, own, ranks=self.ranks, keep=keep)
        for (key, name), found, expected in zip(names.items(), own, solved, strict=True):
            if key in keep and found != expected:
                raise ValueError(
                    f"{stage}.{name}={found} on the command line, but {expected} by the batch sizes of {document.name} "
                    f"with {self.ranks} ranks; expected one of the two. Drop the word on the command line, or write "
                    f"auto in the file."
                )
            self.report.line(f"{name} = {expected}  <- the batch sizes of {document.name}", stage)
        return dict(zip(names.values(), solved, strict=True))


def _replaced(config: _Group, values: dict[str, Any], *, place: str) -> _Group:
    try:
        return replace(config, **values)
    except ValueError as error:
        raise ValueError(f"{error} (With the values of {place}.)") from error


def _check_same_batch(new: dict[str, Any], before: dict[str, Any], *, role: Role) -> None:
    """Actor and critic learn from the same minibatches."""
    for name, size in before.items():
        if isinstance(size, int) and new.get(name, size) != size:
            raise ValueError(
                f"{role.stage}.{role.engine}.deepspeed: {role.stage}.{name} would be {new[name]}, but by the actor's "
                f"file it is {size}; expected the same, for both learn from the same minibatches. Write auto in one "
                f"file."
            )


def _check_schedules(run: RunConfig) -> None:
    for role in (role for stage in run.stages for role in all_roles(run, stage)):
        optimizer = role.optimizer_config(run)
        if optimizer is None or optimizer.schedule not in SHAPES:
            continue
        try:
            options = optimizer.schedule_options
            deepspeed_schedule(optimizer.schedule, lr=optimizer.lr, warmup_steps=0, total_steps=1, options=options)
        except ValueError as error:
            raise ValueError(f"{role.stage}.{role.optimizer}.schedule_options: {error}.") from error


# Every key of a configuration.


def resolve(document: Document, engine: EngineConfig, *, optimizer: OptimizerConfig | None) -> Reading:
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
        reading.section(".".join(section))  # raises ValueError where it is no object
    _check_keys(reading, optimizer)
    read_engine(reading, engine)
    if optimizer is not None:
        read_optimizer(reading, optimizer)
    return reading


def _check_keys(reading: Reading, optimizer: OptimizerConfig | None) -> None:
    """Raise ValueError with everything that is wrong, and warn of keys that nobody reads."""
    problems: list[str] = []
    unknown: list[str] = []
    where = reading.document.where
    for path, value in _keys(reading.document.content, (), trains=optimizer is not None):
        key = TABLE.find(path)
        if key is None and ".".join(path[:-1]) not in CLOSED_SECTIONS:
            unknown.append(f"{'.'.join(path)}{TABLE.hint(path)}")
        elif key is None:
            problems.append(f"{where(path)}: there is no such key{TABLE.hint(path)}")
        elif key.decision is not Decision.refused:
            problems += _unfit(reading, path, key=key, value=value)
        elif is_refused(key, value) and not (path[-1] == "adam_w_mode" and is_adamw(reading, optimizer)):
            shown = "" if isinstance(value, Mapping) else f"={value!r}"
            problems.append(f"{where(path)}{shown}: cannot be honoured. {key.note[0].upper()}{key.note[1:]}.")
    if unknown:
        reading.warnings.append(f"{reading.document.name}: neither DeepSpeed nor this run reads {', '.join(unknown)}")
    if problems:
        raise ValueError("\n".join(problems))


def _unfit(reading: Reading, path: Path, *, key: Key, value: Any) -> list[str]:
    """What is wrong with a value, also where nothing here depends on it."""
    try:
        if value is not None and value != AUTO:
            check_value(value, key=key, path=path, where=reading.document.where)
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
    """Whether a section is switched off, or holds the parameters of an optimizer or schedule that is not here."""
    kind = parent.get("type")
    if path == ("optimizer", "params"):
        key = TABLE.find(("optimizer", "type"))
        return key is not None and is_refused(key, kind)
    if path == ("scheduler", "params"):
        return kind not in (None, AUTO, *SCHEDULES)
    return path == ("data_efficiency",) and not asks(section.get("enabled"))


def fate_of(reading: Reading, written: Path) -> tuple[str, str] | None:
    """What becomes of a value that the file has, and why; None where a setting comes from it."""
    document = reading.document
    path, value = document.renamed.get(written, written), document.written[written]
    key = TABLE.above(path)
    if written in document.unused:
        return "ignored", document.unused[written]
    if path in reading.decided:
        return None
    if any(name.startswith(COMMENTS) for name in path):
        return "ignored", "a comment"
    if key is None and not TABLE.is_section(path):
        return "not read", "neither DeepSpeed nor this run reads it"
    if key is not None and key.decision is Decision.ignored:
        return "ignored", key.note
    if value is None:
        return "no effect", "null: as if it were not there"
    return ("the run's own", "auto") if value == AUTO else _without_effect(path, key)


def _without_effect(path: Path, key: Key | None) -> tuple[str, str]:
    """Why a value sets nothing that could."""
    if key is not None and key.path in (TRAIN, MICRO, STEPS):
        return "mapped", key.note
    is_used = key is None or key.decision is not Decision.refused
    reasons = [WITHOUT_EFFECT.get(".".join(path[:depth])) for depth in range(len(path), 0, -1) if is_used]
    return "no effect", next(filter(None, reasons), "asks for what happens here anyway, or for nothing")


# What the start says.


class ConfigurationReport:
    """What was decided, each line once for all the models it is true of."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._places: dict[str, dict[str, None]] = {}
        self._fates: dict[str, dict[Path, tuple[str, str] | None]] = {}
        """By file and key: what becomes of it, and why; None where a setting names it."""
        self._warnings: dict[str, None] = {}

    def add(self, reading: Reading, chosen: dict[str, Setting], *, place: str) -> None:
        """Note what a configuration decides for one model: the chosen settings, and what becomes of other values."""
        document = reading.document
        self._names |= dict.fromkeys(filter(None, (document.named_by, document.name)))
        for name, setting in chosen.items():
            self.line(f"{name} = {_shown(setting.value)}  <- {setting.origin.format(setting.place)}", place)
        fates = self._fates.setdefault(document.name, {})
        for path in document.written:
            fate = fate_of(reading, path)
            fates[path] = fate and fates.get(path, fate)  # a setting of one model is enough
        self._warnings |= dict.fromkeys(reading.warnings)

    def line(self, line: str, place: str) -> None:
        """Note a line that is true of a place."""
        self._places.setdefault(line, {})[place] = None

    def log(self) -> None:
        """Log all of it; the keys that no setting names on a line for each reason."""
        if not self._names:
            return
        log.info("DeepSpeed configuration %s; all that it does not say is the run's own", ", ".join(self._names))
        for line, places in self._places.items():
            log.info("  %s  [%s]", line, ", ".join(places))
        for name, fates in self._fates.items():
            keys: dict[tuple[str, str], list[str]] = {}
            for path, fate in fates.items():
                if fate is not None:
                    keys.setdefault(fate, []).append(".".join(path))
            file = f"{name}: " if len(self._fates) > 1 else ""
            for (fate_word, why), names in keys.items():
                log.info("  %s: %s%s (%s)", fate_word, file, ", ".join(names), why)
        for line in self._warnings:
            log.warning("%s", line)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
