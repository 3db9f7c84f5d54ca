"""Everything that can be wrong with an evaluation, found before a model is loaded.

Models that an earlier stage of the same run will make are checked once more when they are there. Left out: whether
they fit into memory; one at a time, they do where they were trained.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from rlhf.config import STAGES, EvalConfig, RunConfig
from rlhf.judges import HUMAN, REWARD, load_judges
from rlhf.models.checkpoint import local_folder
from rlhf.models.embedded import prepare
from rlhf.models.scalar_head import has_scalar_head
from rlhf.models.skeleton import max_positions
from rlhf.text import Tokenizer, load_tokenizer, template_fingerprint
from stages.answering import HeldOut
from stages.judging import check_template, check_vocabulary
from stages.session import stage_tokenizer

log = logging.getLogger(__name__)


def check_evaluation(run: RunConfig, todo: list[str], *, ranks: int) -> None:
    """Check settings, models and rows of `stage=eval`.

    Args:
        run: the whole configuration.
        todo: the stages that will have been run before it.
        ranks: processes it will have.

    Raises:
        ValueError: what was found, what was expected, and what to do.
    """
    config = run.eval
    assert config is not None
    check_eval_judges(config, ranks=ranks)
    check_presence(run, config, todo=todo)
    to_come = {setting for setting, path in model_paths(config).items() if stage_around(run, path) in todo}
    if run.model.embedded is not None and ("model" in to_come or run.model.path in model_paths(config).values()):
        prepare(run.model.embedded, Path(run.model.path))
    tokenizer = stage_tokenizer(run, run.model.path if "model" in to_come else config.model)
    check_models(config, tokenizer, left_out=to_come)
    rows = held_out_rows(run, config, tokenizer=tokenizer)
    log.info(
        "eval: %s held-out prompts, %s pairs, %s demonstrations",
        *map(len, (rows.prompts, rows.pairs, rows.demonstrations)),
    )
    if config.reference is not None and (config.sampling.top_k or config.sampling.top_p < 1):
        log.warning(
            "eval.sampling.top_k=%s, top_p=%s: responses are drawn from a cut distribution, while KL is that of the "
            "whole one; it is then too low and can be negative",
            config.sampling.top_k,
            config.sampling.top_p,
        )


def check_eval_judges(config: EvalConfig, *, ranks: int) -> None:
    """Every judge exists and has what it needs.

    Raises:
        ValueError: which does not, and what to do.
    """
    load_judges(config.judges)
    others = [judge for judge in config.judges if judge != REWARD]
    if config.against is None and others:
        raise ValueError(
            f"eval.judges={config.judges} compare two models, but eval.against=null; expected a second model. Name "
            f"one, as in eval.against=MODEL, or set eval.judges=[]."
        )
    if REWARD in config.judges and config.reward is None and config.against is not None:
        raise ValueError(
            f"eval.judges={config.judges} has {REWARD}, but eval.reward=null; expected a reward model. Name one, as in "
            f"eval.reward=MODEL, or leave {REWARD} out."
        )
    if HUMAN in config.judges and ranks > 1:
        raise ValueError(
            f"eval.judges={config.judges} has {HUMAN}, but this run has {ranks} ranks, whose processes have no "
            f"terminal; expected one. Set launch.ranks=1, or leave {HUMAN} out."
        )
    if HUMAN in config.judges and not _can_read():
        raise ValueError(
            f"eval.judges={config.judges} has {HUMAN}, but there is neither a terminal to ask in nor anything piped "
            f"in; expected one of them. Start the run in a terminal, pipe in a line for each pair, or leave "
            f"{HUMAN} out."
        )


def _can_read() -> bool:
    """Whether standard input is something that might hold an answer."""
    try:
        found, nothing = os.fstat(sys.stdin.fileno()), Path(os.devnull).stat()
    except (AttributeError, OSError, ValueError):  # there is none, or it is closed
        return False
    return (found.st_dev, found.st_ino) != (nothing.st_dev, nothing.st_ino)


def model_paths(config: EvalConfig) -> dict[str, str]:
    """The models of an evaluation by the name of their setting."""
    named = {"model": config.model, "against": config.against, "reference": config.reference, "reward": config.reward}
    return {name: path for name, path in named.items() if path is not None}


def stage_around(run: RunConfig, path: str) -> str | None:
    """The stage in whose folder of this run `path` lies, if it does: one of its products, or its best model."""
    folder = Path(path).expanduser()
    root = Path(run.output_dir)
    inside = folder.relative_to(root).parts if folder.is_relative_to(root) else ()
    return inside[0] if inside and inside[0] in STAGES else None


def check_presence(run: RunConfig, config: EvalConfig, *, todo: list[str]) -> None:
    """Every model is there, or will be.

    Raises:
        ValueError: which is missing, and what would make it.
    """
    for setting, path in model_paths(config).items():
        maker = stage_around(run, path)
        if maker in todo or (run.model.embedded and path == run.model.path):
            continue
        try:
            local_folder(path)
        except ValueError as error:
            null = "" if setting == "model" else f", or do without, as in eval.{setting}=null"
            raise ValueError(
                f"eval.{setting}={path}: there is no such model ({error}) {_advice(run, maker)} another, as in "
                f"eval.{setting}=MODEL{null}."
            ) from error


def _advice(run: RunConfig, maker: str | None) -> str:
    """What to do about a missing model, up to the word before `another`."""
    if maker is None:
        return "Name"
    needed = {*run.stages, *STAGES[: STAGES.index(maker) + 1]}
    chosen = ",".join([*(stage for stage in STAGES if stage in needed), "eval"])
    return f"Run the stages that make it first, as in stage=[{chosen}], or name"


def check_models(config: EvalConfig, tokenizer: Tokenizer, *, left_out: set[str]) -> None:
    """All models read the same tokens, have room for the longest rows, and the reward model has a head.

    Args:
        config: what names them.
        tokenizer: that of `eval.model`.
        left_out: settings whose model is not there yet.

    Raises:
        ValueError: which does not, and what to do.
    """
    for setting, path in model_paths(config).items():
        if setting in left_out:
            continue
        folder, name = local_folder(path), f"eval.{setting}={path}"
        _check_positions(config, name, limit=max_positions(folder))
        if setting == "model":
            continue
        found = load_tokenizer(str(folder))
        check_vocabulary(name, found, actor=tokenizer, actor_name=f"eval.model={config.model}")
        if setting == "reward":
            _check_reward(name, folder, config=config, tokenizer=tokenizer)
        elif setting == "against" and template_fingerprint(found) != template_fingerprint(tokenizer):
            log.warning("%s has another chat template than eval.model, and is asked with that of eval.model", name)


def _check_positions(config: EvalConfig, name: str, *, limit: int) -> None:
    longest = max(("max_response_tokens", "max_row_tokens"), key=lambda setting: getattr(config, setting))
    response = getattr(config, longest)
    if config.max_prompt_tokens + response > limit:
        raise ValueError(
            f"eval.max_prompt_tokens + eval.{longest} = {config.max_prompt_tokens} + {response}: {name} has {limit} "
            f"positions; expected at most that many together."
        )


def _check_reward(name: str, folder: Path, *, config: EvalConfig, tokenizer: Tokenizer) -> None:
    if not has_scalar_head(folder):
        raise ValueError(
            f"{name} is a language model without a scalar head; expected a reward model, an "
            f"AutoModelForSequenceClassification with one label. Train one with stage=reward, or set eval.reward=null."
        )
    check_template(name, folder, actor=tokenizer, actor_name=f"eval.model={config.model}")


def held_out_rows(run: RunConfig, config: EvalConfig, *, tokenizer: Tokenizer) -> HeldOut:
    """The held-out rows of an evaluation, of which there must be prompts.

    Raises:
        ValueError: there are none, or rows that cannot be used.
    """
    rows = HeldOut.read(run.data, config, tokenizer=tokenizer)
    if not rows.prompts:
        raise ValueError(
            "data.ppo.eval is empty and data.ppo.eval_fraction holds no row out; expected held-out prompts, which "
            "eval.model answers. Name some, as in data.ppo.eval=[FILE]."
        )
    return rows
