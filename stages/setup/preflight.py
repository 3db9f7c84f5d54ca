"""Checks a whole run before any model is loaded: folders, batch sizes, devices, disks, models, then the data.

See also: `rlhf/memory_plan/`, which checks afterwards whether the run fits into memory.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.build_samples import LengthLimits
from data.samples import READERS, Demonstration, Preference, Prompt, demonstrations, preferences, prompts, ptx_texts
from rlhf.config.bounds import MicroBatchLimit, accumulation, divisible
from rlhf.config.engine_config import OffloadDevice, Precision
from rlhf.config.eval_config import EvalConfig
from rlhf.config.ppo_config import PPOConfig
from rlhf.config.roles import engines_of, maker_of, origin_of, roles_of
from rlhf.config.run_config import STAGES, RunConfig
from rlhf.engine.offload.direct_io import check_nvme_path
from rlhf.engine.sharding import check_copies
from rlhf.evaluation.judges import HUMAN, REWARD, load_judges
from rlhf.evaluation.metrics import load_gold
from rlhf.reward_calls import RewardFunctions
from rlhf.runtime.dist import check_devices
from rlhf.runtime.launch import local_ranks
from rlhf.text.tokenizer import Tokenizer
from rlhf.tracking.tracker import requested_mode
from stages.lifecycle.checkpointing import check_resume, remove_checkpoints
from stages.lifecycle.session import stage_tokenizer
from stages.lifecycle.stage_models import scored_sources
from stages.lifecycle.stage_record import check_folder, is_finished
from stages.setup.compatibility import check_models
from stages.setup.reward_checks import check_reward_columns, check_rewards, read_prompts

log = logging.getLogger(__name__)

_FEW_PAIRS = 30


def preflight(run: RunConfig, *, ranks: int) -> list[str]:
    """Check the whole run and return the stages that are left to do, in order.

    Raises:
        ValueError: the run cannot work; the message says what was found, what was expected, and what to do.
    """
    if not run.stages and not run.uses:
        raise ValueError("stage=[]: nothing is selected; expected some of sft, reward, dpo, ppo, eval, chat.")
    check_devices(run.engine.device, ranks=local_ranks(ranks))
    for stage in run.stages:
        check_folder(run, stage)
    todo = [stage for stage in run.stages if not is_finished(run, stage)]
    check_made_from_finished(run, todo)
    for stage in [stage for stage in run.stages if stage not in todo]:
        log.info("%s is finished (%s), skipping it", run.title(stage), run.folder(stage))
        remove_checkpoints(Path(run.folder(stage)))
    for stage in todo:
        log.info("%s", batch_arithmetic(run, stage, ranks=ranks))
        check_device(run, stage, ranks=ranks)
        check_disks(run, stage)
    for stage in [*todo, *(use for use in run.uses if use == "eval")]:
        check_rewards(run, stage)
    check_models(run, [*todo, *(use for use in run.uses if use == "eval")], todo=todo)
    load_gold(run.data.gold)
    requested_mode(run.tracking.wandb)  # refuses an unknown WANDB_MODE
    if todo:
        check_data(run, todo)
    if run.eval is not None:
        check_device(run, "eval", ranks=ranks)
        check_disks(run, "eval")
        check_evaluation(run, todo, ranks=ranks)
    return todo


def check_made_from_finished(run: RunConfig, todo: list[str]) -> None:
    """Refuse to train a model again from which a finished stage was made.

    Raises:
        ValueError: names that stage.
    """
    for stage in STAGES:
        if stage in todo or not is_finished(run, stage) or getattr(run, stage) is None:
            continue
        makers = {maker_of(run, role.path) for role in roles_of(run, stage)} & set(todo)
        if makers:
            folder = Path(run.folder(stage))
            raise ValueError(
                f"{folder} is finished, but it was made from the {'/'.join(sorted(map(str, makers)))} model that this "
                f"run would make anew. Remove {folder} to make it anew too, or choose another name= or output_dir=."
            )


def batch_arithmetic(run: RunConfig, stage: str, *, ranks: int) -> str:
    """The batch sizes of a stage as one line of arithmetic.

    Raises:
        ValueError: the sizes do not divide.
    """
    config = run.training_config(stage)
    name, size = config.batch_setting, config.batch_size
    shares = _shares(size, config.micro_batch_limit, ranks=ranks, name=f"{stage}.{name}", unit=config.row_unit)
    text = f"{run.title(stage)}: {name} {shares}"
    return f"{text}; {_rollout_arithmetic(run.ppo, ranks)}" if run.ppo is not None and stage == "ppo" else text


def _shares(size: int, limit: MicroBatchLimit, *, ranks: int, name: str, unit: str) -> str:
    steps = accumulation(size, limit=limit, ranks=ranks, name=name)
    if steps is None:
        return f"{size} on {ranks} ranks in micro-batches of at most {limit.tokens} tokens and {limit.rows} {unit}"
    return f"{size} = {ranks} ranks x {limit.rows} {unit} x {steps} accumulation"


def _rollout_arithmetic(config: PPOConfig, ranks: int) -> str:
    group = ranks * config.samples_per_prompt
    prompts_each = divisible(config.rollout_size, by=group, names="ppo.rollout_size by ranks x samples_per_prompt")
    cuts = config.rollout_size // config.minibatch_size
    text = ""
    if config.ptx.coef:
        size, limit = config.ptx.batch_size, config.micro_batch_limit
        shares = _shares(size, limit, ranks=ranks, name="ppo.ptx.batch_size", unit="sequences")
        text = f"; ptx.batch_size {shares}"
    return (
        f"rollout_size {config.rollout_size} = {ranks} ranks x {prompts_each} prompts x {config.samples_per_prompt} "
        f"samples; {cuts * config.epochs} steps per iteration = {cuts} minibatches x {config.epochs} epochs{text}"
    )


def check_device(run: RunConfig, stage: str, *, ranks: int) -> None:
    """Check that all engines use the run's device, on which a process stays, and can share copies between the ranks.

    Raises:
        ValueError: an engine asks for another device, or the ranks do not divide.
    """
    for name, engine in engines_of(run, stage).items():
        check_copies(f"{stage}.{name}", engine, ranks=ranks)
        if engine.device != run.engine.device:
            raise ValueError(
                f"{stage}.{name}.device={engine.device} differs from engine.device={run.engine.device}: ranks stay on "
                f"one device. Set engine.device, or run the stage on its own."
            )


def check_disks(run: RunConfig, stage: str) -> None:
    """Check that files can be written to every `nvme_path` in use; the memory plan checks the space.

    Raises:
        ValueError: the folder cannot be created or written, or memory is asked for that a disk is there to save.
    """
    for engine in engines_of(run, stage).values():
        if OffloadDevice.nvme in (engine.offload_optimizer, engine.offload_param):
            assert engine.nvme_path is not None, "EngineConfig has checked it"
            check_nvme_path(engine.nvme_path)
    for role in roles_of(run, stage):
        optimizer, engine = role.optimizer_config(run), role.engine_config(run)
        if optimizer is not None and optimizer.ema_decay and engine.offload_optimizer is OffloadDevice.nvme:
            raise ValueError(
                f"{stage}.{role.optimizer}.ema_decay={optimizer.ema_decay} keeps an average of the weights in memory; "
                f"expected 0 with {stage}.{role.engine}.offload_optimizer=nvme, which is there to save that memory."
            )


def check_warmup(run: RunConfig, stage: str, *, num_rows: int) -> None:
    """Check that no warm-up is longer than its stage.

    Raises:
        ValueError: one is.
    """
    for role in roles_of(run, stage):
        optimizer = role.optimizer_config(run)
        if role.optimizer is None or optimizer is None:
            continue
        steps = run.training_config(stage).optimizer_steps(role.optimizer, num_rows=num_rows)
        if optimizer.warmup_of(steps) > steps:
            raise ValueError(
                f"{stage}.{role.optimizer}.warmup_steps={optimizer.warmup_steps}: the stage has only {steps} steps; "
                f"expected at most that many."
            )


def check_ppo(run: RunConfig, config: PPOConfig, *, todo: list[str]) -> None:
    """Check that scores can be normalised, if the reward models exist already; warn of what biases the KL."""
    if not {maker_of(run, source.source) for source in config.model_sources().values()} & set(todo):
        scored_sources(config)
    narrow = config.reference_engine.precision is not Precision.fp32
    if config.reference_update_every and config.reference_update_mix < 0.5 and narrow:
        log.warning(
            "ppo.reference_update_mix=%s: a reference in 16 bits loses what an update changes by less than half a "
            "weight's last bit; ppo.reference_engine.precision=fp32 keeps all of it",
            config.reference_update_mix,
        )
    if config.sampling.top_k or config.sampling.top_p < 1:
        log.warning(
            "ppo.sampling.top_k=%s, top_p=%s: responses are drawn from a truncated distribution, but log-probabilities "
            "and KL are computed with the whole one; the KL is then too low and can be negative",
            config.sampling.top_k,
            config.sampling.top_p,
        )


def check_texts(run: RunConfig, *, tokenizer: Tokenizer) -> str:
    """Read the texts that PPO mixes in; warn if there are some and none is wanted. Returns their fingerprint."""
    assert run.ppo is not None
    if run.data.ptx.train and not run.ppo.ptx.coef:
        log.warning("data.ptx.train is not read: ppo.ptx.coef=0 mixes nothing in; set it above 0 to learn these texts")
    found = ptx_texts(run.data, run.ppo, tokenizer=tokenizer)
    if found.train:
        log.info("%s: %s sequences of text beside the prompts (ppo.ptx)", run.title("ppo"), len(found.train))
    return found.fingerprint


def check_data(run: RunConfig, stages: list[str]) -> None:
    """Read, check and tokenise the data of every stage that is left to do.

    Raises:
        ValueError: a data set, a row or a chat template cannot be used.
    """
    for stage in stages:
        config, first = run.training_config(stage), roles_of(run, stage)[0]
        tokenizer = stage_tokenizer(run, origin_of(run, first, todo=stages))
        read = partial(READERS[config.rows], run.data, config, tokenizer=tokenizer)
        splits = read_prompts(run.ppo, read) if run.ppo is not None and stage == "ppo" else read()
        if splits.note:
            log.warning("%s", splits.note)
        text = check_texts(run, tokenizer=tokenizer) if stage == "ppo" else ""
        check_resume(Path(run.folder(stage)), data=splits.fingerprint + text)
        check_warmup(run, stage, num_rows=len(splits.train))
        if stage != "ppo" and not splits.eval:
            raise ValueError(
                f"data.{stage}.eval is empty and data.{stage}.eval_fraction holds out no row; expected held-out rows, "
                f"on which the stage is evaluated."
            )
        if stage == "reward" and len(splits.eval) < _FEW_PAIRS:
            log.warning("reward: only %s held-out pairs set the scale of all scores in PPO", len(splits.eval))
        if run.ppo is not None and stage == "ppo":
            check_ppo(run, run.ppo, todo=stages)
        log.info("%s: %s rows to train on, %s held out", run.title(stage), len(splits.train), len(splits.eval))


# The evaluation. Left out: whether its models fit into memory; one at a time, they do wherever they were trained.


@dataclass(frozen=True)
class HeldOutRows:
    """Tokenised rows that no model was trained on."""

    prompts: list[Prompt]
    pairs: list[Preference]
    demonstrations: list[Demonstration]


def held_out_rows(run: RunConfig, *, tokenizer: Tokenizer) -> HeldOutRows:
    """The first held-out rows of each kind; there must be prompts, and pairs are read only for a reward model.

    Raises:
        ValueError: no prompts, rows that cannot be used, or all of them longer than the limits.
    """
    config, data = run.eval, run.data
    assert config is not None
    short = LengthLimits("eval", config.max_prompt_tokens, config.max_response_tokens)
    long = LengthLimits("eval", config.max_prompt_tokens, config.max_row_tokens, "max_row_tokens")
    pairs: list[Preference] = []
    demos: list[Demonstration] = []
    if config.reward is not None and (data.reward.train or data.reward.eval):
        pairs = preferences(data, config, tokenizer=tokenizer, held_out=long, subset_column=config.subset).eval
    if data.sft.train or data.sft.eval:
        demos = demonstrations(data, config, tokenizer=tokenizer, held_out=long).eval
    functions, name = RewardFunctions.load(config, stage="eval"), "the held-out part of data.ppo"
    read = partial(prompts, data, config, tokenizer=tokenizer, held_out=short)
    asked = read(columns=functions.columns).eval
    check_reward_columns(functions, {name: asked}, reread=lambda: {name: read(columns=None).eval})
    if not asked:
        raise ValueError(
            "data.ppo.eval is empty and data.ppo.eval_fraction holds no row out; expected held-out prompts, which "
            "eval.model answers. Name some, as in 'data.ppo.eval=[FILE]'."
        )
    return HeldOutRows(asked[: config.prompts], pairs[: config.rows or None], demos[: config.rows or None])


def check_evaluation(run: RunConfig, todo: list[str], *, ranks: int) -> None:
    """Check settings and rows of `stage=eval`.

    Args:
        run: the whole configuration.
        todo: the stages that will run before it.
        ranks: processes it will have.

    Raises:
        ValueError: what was found, what was expected, and what to do.
    """
    config = run.eval
    assert config is not None
    check_judges(config, ranks=ranks)
    tokenizer = stage_tokenizer(run, origin_of(run, roles_of(run, "eval")[0], todo=todo))
    rows = held_out_rows(run, tokenizer=tokenizer)
    log.info(
        "eval: %s held-out prompts, %s pairs, %s demonstrations",
        len(rows.prompts),
        len(rows.pairs),
        len(rows.demonstrations),
    )
    sampling = config.sampling
    if config.reference is not None and (sampling.top_k or sampling.top_p < 1):
        log.warning(
            "eval.sampling.top_k=%s, top_p=%s: responses are drawn from a truncated distribution, while KL is that of "
            "the whole one; it is then too low and can be negative",
            sampling.top_k,
            sampling.top_p,
        )


def check_judges(config: EvalConfig, *, ranks: int) -> None:
    """Check that every judge exists and has what it needs.

    Raises:
        ValueError: which does not, and what to do.
    """
    load_judges(config.judges)
    named = f"eval.judges={config.judges}"
    if config.baseline is None and set(config.judges) - {REWARD}:
        raise ValueError(
            f"{named} compare two models, but eval.baseline=null; expected a second model. Name one, as in "
            "eval.baseline=MODEL, or set 'eval.judges=[]'."
        )
    if REWARD in config.judges and config.reward is None and config.baseline is not None:
        raise ValueError(
            f"{named} has {REWARD}, but eval.reward=null; expected a reward model. Name one, as in eval.reward=MODEL, "
            f"or leave {REWARD} out."
        )
    if HUMAN in config.judges and ranks > 1:
        raise ValueError(
            f"{named} has {HUMAN}, but this run has {ranks} ranks, whose processes have no terminal; expected one. Set "
            f"launch.ranks=1, or leave {HUMAN} out."
        )
    if HUMAN in config.judges and not _has_input():
        raise ValueError(
            f"{named} has {HUMAN}, but there is neither a terminal to ask in nor anything piped in; expected one of "
            f"them. Start the run in a terminal, pipe in a line for each pair, or leave {HUMAN} out."
        )


def _has_input() -> bool:
    """Whether standard input could hold an answer: it is open, and not the null device."""
    try:
        found, null = os.fstat(sys.stdin.fileno()), Path(os.devnull).stat()
    except (AttributeError, OSError, ValueError):  # there is none, or it is closed
        return False
    return (found.st_dev, found.st_ino) != (null.st_dev, null.st_ino)
