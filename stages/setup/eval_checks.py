"""Everything that can be wrong with an evaluation, found before a model is loaded.

Left out: its models (`compatibility.py`), and whether they fit into memory; one at a time, they do where they were
trained.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from rlhf.config.eval_config import EvalConfig
from rlhf.config.roles import origin_of, roles_of
from rlhf.config.run_config import RunConfig
from rlhf.evaluation.judges import HUMAN, REWARD, load_judges
from rlhf.text.tokenizer import Tokenizer
from stages.eval_models import HeldOut
from stages.lifecycle.session import stage_tokenizer

log = logging.getLogger(__name__)


def check_evaluation(run: RunConfig, todo: list[str], *, ranks: int) -> None:
    """Check settings and rows of `stage=eval`.

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
    first = roles_of(run, "eval")[0]
    tokenizer = stage_tokenizer(run, origin_of(run, first, todo=todo))
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
    if config.baseline is None and others:
        raise ValueError(
            f"eval.judges={config.judges} compare two models, but eval.baseline=null; expected a second model. Name "
            f"one, as in eval.baseline=MODEL, or set 'eval.judges=[]'."
        )
    if REWARD in config.judges and config.reward is None and config.baseline is not None:
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


def held_out_rows(run: RunConfig, config: EvalConfig, *, tokenizer: Tokenizer) -> HeldOut:
    """The held-out rows of an evaluation, of which there must be prompts.

    Raises:
        ValueError: there are none, or rows that cannot be used.
    """
    rows = HeldOut.read(run.data, config, tokenizer=tokenizer)
    if not rows.prompts:
        raise ValueError(
            "data.ppo.eval is empty and data.ppo.eval_fraction holds no row out; expected held-out prompts, which "
            "eval.model answers. Name some, as in 'data.ppo.eval=[FILE]'."
        )
    return rows
