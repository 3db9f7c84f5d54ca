"""Evaluation: what two models say to held-out prompts, judged and compared."""

from __future__ import annotations

from rlhf.config import RunConfig
from rlhf.dist import World


def run_eval(run: RunConfig, world: World) -> None:
    """Evaluate `eval.model`, and compare it with `eval.against`."""
    raise NotImplementedError
