"""Everything that can be wrong with a run, found before a model is loaded.

In this order, cheapest first: folders of other settings, batch arithmetic, missing inputs, data rows, and, once the
tokenizer is there, templates and lengths. Left out: whether the run fits into memory.
"""

from __future__ import annotations

import logging
from pathlib import Path

from data.demonstrations import demonstrations
from data.preferences import preferences
from data.prompts import prompts

from rlhf.config.groups import accumulation, divisible
from rlhf.config.run import RunConfig
from rlhf.config.stages import PPOConfig, SupervisedConfig
from rlhf.evaluation import load_gold
from rlhf.models.embedded import prepare
from stages.handover import check_folder, is_finished
from stages.session import stage_tokenizer

log = logging.getLogger(__name__)

_PRODUCTS = {"sft/model": "sft", "reward/model": "reward"}


def preflight(run: RunConfig, *, ranks: int) -> list[str]:
    """Check the whole run and return the stages that are left to do, in order.

    Raises:
        ValueError: what was found, what was expected, and what to do.
    """
    if not run.stages:
        raise ValueError("stage=[]: no stage is selected; expected some of sft, reward, ppo.")
    for stage in run.stages:
        check_folder(run, stage)
    todo = [stage for stage in run.stages if not is_finished(run, stage)]
    for stage in set(run.stages) - set(todo):
        log.info("%s is finished (%s), skipping it", stage, Path(run.output_dir) / stage)
    for stage in todo:
        log.info("%s", batch_arithmetic(run, stage, ranks=ranks))
        check_inputs(run, stage)
    load_gold(run.data.gold)
    if todo:
        check_data(run, todo)
    return todo


def batch_arithmetic(run: RunConfig, stage: str, *, ranks: int) -> str:
    """The batch sizes of a stage as a sum that adds up.

    Raises:
        ValueError: sizes do not divide.
    """
    config = getattr(run, stage)
    assert isinstance(config, PPOConfig | SupervisedConfig)
    is_ppo = isinstance(config, PPOConfig)
    size, setting = (
        (config.minibatch_size, "minibatch_size") if is_ppo else (config.global_batch_size, "global_batch_size")
    )
    micro = config.micro_batch_size
    steps = accumulation(size, micro_batch_size=micro, ranks=ranks, name=f"{stage}.{setting}")
    what = "pairs" if stage == "reward" else "sequences"
    text = f"{stage}: {setting} {size} = {ranks} ranks x {micro} {what} x {steps} accumulation"
    if not isinstance(config, PPOConfig):
        return text
    each = divisible(
        config.rollout_size,
        by=ranks * config.samples_per_prompt,
        names="ppo.rollout_size by ranks x samples_per_prompt",
    )
    updates = config.rollout_size // config.minibatch_size * config.epochs
    rollout = (
        f"rollout_size {config.rollout_size} = {ranks} ranks x {each} prompts x {config.samples_per_prompt} samples"
    )
    return f"{text}; {rollout}; {updates} steps per iteration = {updates // config.epochs} minibatches x {config.epochs} epochs"


def check_inputs(run: RunConfig, stage: str) -> None:
    """Every model that a stage starts from is there, or will be made by an earlier stage of this run.

    Raises:
        ValueError: which is missing, and what would make it.
    """
    for setting, path in model_paths(run, stage).items():
        made_by = next(
            (name for product, name in _PRODUCTS.items() if Path(path) == Path(run.output_dir) / product), None
        )
        if Path(path).exists() or path == run.model.path or made_by in run.stages:
            continue
        if made_by is not None:
            raise ValueError(
                f"{setting}={path}: there is no such model. Run the stage that makes it first, "
                f"as in stage=[{made_by},{stage}], or name another, as in {setting}=MODEL."
            )


def model_paths(run: RunConfig, stage: str) -> dict[str, str]:
    """The models a stage starts from, by the name of the setting."""
    config = getattr(run, stage)
    if isinstance(config, PPOConfig):
        named = {name: getattr(config, name) for name in ("actor", "reference", "reward", "critic")}
    else:
        named = {"init_from": config.init_from}
    return {f"{stage}.{name}": path for name, path in named.items() if path is not None}


def check_data(run: RunConfig, stages: list[str]) -> None:
    """Read, validate and tokenise the data of every stage that is left to do.

    Raises:
        ValueError: a data set, a row, or a template that cannot be used.
    """
    readers = {"sft": demonstrations, "reward": preferences, "ppo": prompts}
    for stage in stages:
        readers[stage].check(run.data)
    if run.model.embedded is not None:
        prepare(run.model.embedded, Path(run.model.path))
    for stage in stages:
        source = next(iter(model_paths(run, stage).values()))
        tokenizer = stage_tokenizer(run, source if Path(source).exists() else run.model.path)
        splits = readers[stage](run.data, tokenizer, config=getattr(run, stage))
        log.info("%s", splits)
