"""Checks the settings and rows of an evaluation before a model is loaded.

See also: `compatibility.py`, which checks its models. Left out: whether they fit into memory; one at a time, they do
wherever they were trained.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from data.build_samples import LengthLimits
from data.samples import Demonstration, Preference, Prompt, demonstrations, preferences, prompts
from rlhf.config.eval_config import EvalConfig
from rlhf.config.roles import origin_of, roles_of
from rlhf.config.run_config import RunConfig
from rlhf.evaluation.judges import HUMAN, REWARD, load_judges
from rlhf.text.tokenizer import Tokenizer
from stages.lifecycle.session import stage_tokenizer

log = logging.getLogger(__name__)


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
    asked = prompts(data, config, tokenizer=tokenizer, held_out=short).eval
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
