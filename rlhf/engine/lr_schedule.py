"""The learning rate and betas of a step, by one of our schedules or one of DeepSpeed's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.algorithms.schedules import learning_rate_multiplier
from rlhf.deepspeed.deepspeed_schedules import SHAPES, Betas, OneCycle, deepspeed_schedule

_NO_OPTIONS: Mapping[str, Any] = {}


def learning_rate(
    step: int,
    *,
    lr: float,
    kind: str,
    total_steps: int,
    warmup_steps: int = 0,
    min_ratio: float = 0.0,
    options: Mapping[str, Any] = _NO_OPTIONS,
) -> float:
    """The learning rate at `step`, of any schedule.

    Args:
        step: optimizer steps taken before this one.
        lr: the optimizer's learning rate.
        kind: "constant", "linear", "cosine", or one of DeepSpeed's `SHAPES`.
        total_steps: length of the run, warm-up included.
        warmup_steps: length of the warm-up.
        min_ratio: where "linear" and "cosine" arrive, as a share of `lr`.
        options: what one of DeepSpeed's shapes is told besides.
    """
    if kind in SHAPES:
        shape = deepspeed_schedule(kind, lr=lr, warmup_steps=warmup_steps, total_steps=total_steps, options=options)
        rate: float = shape.lr_at(step)
        return rate
    return lr * learning_rate_multiplier(
        step, kind=kind, total_steps=total_steps, warmup_steps=warmup_steps, min_ratio=min_ratio
    )


def betas_of_step(step: int, *, betas: Sequence[float], kind: str, options: Mapping[str, Any] = _NO_OPTIONS) -> Betas:
    """AdamW's betas at `step`: `betas`, unless the schedule cycles them."""
    own = Betas(*betas)
    if kind != "one_cycle":
        return own
    return OneCycle(**options).betas_at(step) or own
