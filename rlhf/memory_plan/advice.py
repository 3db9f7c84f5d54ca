"""What to change when a stage does not fit: the cheapest first, each tried by planning again.

Changes that leave results alone come first, in the order of what they cost in time; adapters, which learn something
else, come last. Left out: fewer tokens or other models, which are the user's to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rlhf.config.engine_config import EngineConfig, OffloadDevice
from rlhf.config.model_config import LoraConfig
from rlhf.config.run_config import RunConfig
from rlhf.config.stage_configs import TrainingConfig
from rlhf.memory_plan.plan import Limits, Plan

_LORA_RANK = 16

Planner = Callable[[RunConfig], Plan]


@dataclass(frozen=True)
class Change:
    """Settings that take less memory."""

    settings: tuple[str, ...]
    """As on the command line."""
    cost: str
    run: RunConfig
    """With the settings."""


@dataclass(frozen=True)
class _Step:
    settings: tuple[str, ...]
    cost: str
    apply: Callable[[TrainingConfig], TrainingConfig]


def cheapest_change(run: RunConfig, stage: str, *, plan: Planner, limits: Limits, ranks: int) -> Change | None:
    """The cheapest change that makes the stage fit: one where one is enough, else as few as are needed of all in order.

    Args:
        run: does not fit.
        stage: which does not.
        plan: plans the stage of a run.
        limits: what there is.
        ranks: of the run.
    """

    def excess(config: TrainingConfig) -> int:
        found = plan(replace(run, **{stage: config})).shortages(limits)
        return sum(shortage.needed - shortage.available for shortage in found)

    config = getattr(run, stage)
    steps = list(_steps(config, stage, run=run, ranks=ranks, is_cuda=limits.device is not None))
    for step in steps:
        if excess(step.apply(config)) == 0:
            return _change(run, stage, steps=[step])
    chosen = _enough_of(steps, config, excess=excess)
    return _change(run, stage, steps=chosen) if chosen else None


def _enough_of(steps: list[_Step], config: TrainingConfig, *, excess: Callable[[TrainingConfig], int]) -> list[_Step]:
    """The first steps that together are enough, without those that are not needed; empty if none are."""
    chosen: list[_Step] = []
    remaining = excess(config)
    for step in steps:
        left = excess(_applied([*chosen, step], config))
        if left < remaining:
            chosen, remaining = [*chosen, step], left
        if remaining == 0:
            break
    if remaining:
        return []
    for step in chosen[:-1]:
        fewer = [other for other in chosen if other is not step]
        chosen = fewer if excess(_applied(fewer, config)) == 0 else chosen
    return chosen


def _applied(steps: list[_Step], config: TrainingConfig) -> TrainingConfig:
    for step in steps:
        config = step.apply(config)
    return config


def _change(run: RunConfig, stage: str, *, steps: list[_Step]) -> Change:
    changed = replace(run, **{stage: _applied(steps, getattr(run, stage))})
    latest = {text.partition("=")[0]: text for step in steps for text in step.settings}
    return Change(tuple(latest.values()), "; ".join(dict.fromkeys(step.cost for step in steps)), changed)


def _steps(config: TrainingConfig, stage: str, *, run: RunConfig, ranks: int, is_cuda: bool) -> Iterator[_Step]:
    engine = config.engine
    if ranks > 1 and engine.zero_stage < 2:
        yield _engines(stage, config, cost="no slower", zero_stage=2)
    yield from _smaller_batches(stage, config)
    if not engine.activation_checkpointing:
        yield _engines(stage, config, cost="about a third more compute", activation_checkpointing=True)
    if ranks > 1 and engine.zero_stage < 3:
        yield _engines(stage, config, cost="half as much communication again", zero_stage=3)
    if is_cuda:
        yield _engines(
            stage,
            config,
            cost="the step runs on the CPU",
            zero_stage=max(1, engine.zero_stage),
            offload_optimizer=OffloadDevice.cpu,
        )
        yield _engines(stage, config, cost="weights travel to every use", zero_stage=3, offload_param=OffloadDevice.cpu)
    nvme = {"nvme_path": engine.nvme_path or "FOLDER"}
    yield _engines(
        stage,
        config,
        cost="the step reads and writes a disk",
        zero_stage=max(1, engine.zero_stage),
        offload_optimizer=OffloadDevice.nvme,
        **nvme,
    )
    yield _engines(
        stage, config, cost="every use of weights reads a disk", zero_stage=3, offload_param=OffloadDevice.nvme, **nvme
    )
    if config.lora.rank == 0:
        lora = LoraConfig(**{**vars(config.lora), "rank": _LORA_RANK})
        setting = f"{stage}.lora.rank={_LORA_RANK}"
        yield _Step((setting,), "adapters learn less than the whole model", lambda c: replace(c, lora=lora))


def _smaller_batches(stage: str, config: TrainingConfig) -> Iterator[_Step]:
    """Half the micro-batch, half of that, and so on: the same results, less to compute at once."""
    sizes = {name: getattr(config, name) for name in config.micro_batch_settings}
    while any(size % 2 == 0 for size in sizes.values()):
        sizes = {name: size // 2 if size % 2 == 0 else size for name, size in sizes.items()}
        settings = tuple(f"{stage}.{name}={size}" for name, size in sizes.items())
        yield _Step(settings, "smaller batches are slower on a GPU", _replacing(dict(sizes)))


def _replacing(values: dict[str, Any]) -> Callable[[TrainingConfig], TrainingConfig]:
    return lambda config: replace(config, **values)


def _engines(stage: str, config: TrainingConfig, *, cost: str, **values: Any) -> _Step:
    """The same settings for the engine of every role."""
    names = [name for name in vars(config) if isinstance(getattr(config, name), EngineConfig)]

    def apply(before: TrainingConfig) -> TrainingConfig:
        return replace(before, **{name: _raised(getattr(before, name), values) for name in names})

    return _Step(tuple(f"{stage}.engine.{name}={_text(value)}" for name, value in values.items()), cost, apply)


def _raised(engine: EngineConfig, values: dict[str, Any]) -> EngineConfig:
    """The engine with `values`, but never a lower stage than it has."""
    values = dict(values)
    if "zero_stage" in values:
        values["zero_stage"] = max(engine.zero_stage, values["zero_stage"])
    return replace(engine, **values)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
