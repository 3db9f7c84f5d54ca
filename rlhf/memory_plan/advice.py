"""Finds what to change when a stage does not fit: the cheapest change first, each tried by planning again.

Changes that leave results alone come first, in the order of what they cost in time; adapters, which learn something
else, come last. Left out: fewer tokens or other models, which are the user's to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from rlhf.config.engine_config import EngineConfig, OffloadDevice
from rlhf.config.roles import all_roles
from rlhf.config.run_config import RunConfig
from rlhf.memory_plan.plan import Limits, Plan

_LORA_RANK = 16


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
    """One thing to try: new values of some settings of a stage."""

    cost: str
    values: dict[str, Any]
    group: str = ""
    """The settings are those of `engine` (of every role's engine), of `lora`, or of the stage itself."""

    def apply(self, run: RunConfig, stage: str) -> RunConfig:
        """The run with the new values."""
        config, values = run.training_config(stage), self.values
        if self.group == "engine":
            values = {role.engine: self._raised(role.engine_config(run)) for role in all_roles(run, stage)}
        if self.group == "lora":
            values = {"lora": replace(config.lora, **values)}
        changed: dict[str, Any] = {stage: replace(config, **values)}
        return replace(run, **changed)

    def settings(self, stage: str) -> dict[str, str]:
        """Names and values as on the command line."""
        group = f"{stage}.{self.group}.".replace("..", ".")
        return {
            group + name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in self.values.items()
        }

    def _raised(self, engine: EngineConfig) -> EngineConfig:
        """The engine with the new values, but never a lower ZeRO stage than it has."""
        zero_stage = max(engine.zero_stage, self.values.get("zero_stage", 0))
        return replace(engine, **(self.values | {"zero_stage": zero_stage}))


def cheapest_change(
    run: RunConfig, stage: str, *, plan: Callable[[RunConfig], Plan], limits: Limits, ranks: int
) -> Change | None:
    """The cheapest change that makes the stage fit: one where one is enough, else as few as are needed of all in order.

    Args:
        run: does not fit.
        stage: which does not.
        plan: plans the stage of a run.
        limits: what there is.
        ranks: of the run.
    """

    def applied(steps: list[_Step]) -> RunConfig:
        return reduce(lambda changed, step: step.apply(changed, stage), steps, run)

    def excess(steps: list[_Step]) -> int:
        shortages = plan(applied(steps)).shortages(limits)
        return sum(shortage.needed - shortage.available for shortage in shortages)

    steps = list(_steps(run, stage, ranks=ranks, is_cuda=limits.device is not None))
    chosen = next(([step] for step in steps if excess([step]) == 0), None) or _enough_of(steps, excess)
    if not chosen:
        return None
    settings: dict[str, str] = {}
    for step in chosen:
        settings |= step.settings(stage)  # of several values of one setting, the last
    costs = dict.fromkeys(step.cost for step in chosen)
    words = tuple(f"{name}={value}" for name, value in settings.items())
    return Change(words, "; ".join(costs), applied(chosen))


def _enough_of(steps: list[_Step], excess: Callable[[list[_Step]], int]) -> list[_Step]:
    """The first steps that together are enough, without those that are not needed; empty if none are."""
    chosen: list[_Step] = []
    remaining = excess([])
    for step in steps:
        left = excess([*chosen, step])
        if left < remaining:
            chosen, remaining = [*chosen, step], left
        if remaining == 0:
            break
    if remaining:
        return []
    for step in chosen[:-1]:
        fewer = [other for other in chosen if other is not step]
        chosen = fewer if excess(fewer) == 0 else chosen
    return chosen


def _steps(run: RunConfig, stage: str, *, ranks: int, is_cuda: bool) -> Iterator[_Step]:
    """Everything to try, the cheapest first."""
    config = run.training_config(stage)
    engine, on_cpu, on_disk = config.engine, OffloadDevice.cpu, OffloadDevice.nvme
    sharded, nvme = {"zero_stage": max(1, engine.zero_stage)}, {"nvme_path": engine.nvme_path or "FOLDER"}
    if ranks > 1 and engine.zero_stage < 2:
        yield _Step("no slower", {"zero_stage": 2}, "engine")
    # Half the micro-batch, half of that, and so on: the same results, less to compute at once.
    sizes = {name: getattr(config, name) for name in config.micro_batch_settings}
    while any(size % 2 == 0 for size in sizes.values()):
        sizes = {name: size // 2 if size % 2 == 0 else size for name, size in sizes.items()}
        yield _Step("smaller batches are slower on a GPU", sizes)
    if not engine.activation_checkpointing:
        yield _Step("about a third more compute", {"activation_checkpointing": True}, "engine")
    if ranks > 1 and engine.zero_stage < 3:
        yield _Step("half as much communication again", {"zero_stage": 3}, "engine")
    if is_cuda:
        yield _Step("the step runs on the CPU", {**sharded, "offload_optimizer": on_cpu}, "engine")
        yield _Step("weights travel to every use", {"zero_stage": 3, "offload_param": on_cpu}, "engine")
    yield _Step("the step reads and writes a disk", {**sharded, "offload_optimizer": on_disk, **nvme}, "engine")
    yield _Step("every use of weights reads a disk", {"zero_stage": 3, "offload_param": on_disk, **nvme}, "engine")
    if config.lora.rank == 0:
        yield _Step("adapters learn less than the whole model", {"rank": _LORA_RANK}, "lora")
