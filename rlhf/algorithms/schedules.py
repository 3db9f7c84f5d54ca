"""Learning-rate schedules as pure functions of the step.

Steps count from 0, and `step` is the one about to be taken. Two conventions keep every step useful:

* Warm-up multiplies by `(step + 1) / warmup_steps`: the first step is taken, at `1 / warmup_steps`, and the last step
  of the warm-up is the first at the full rate. (DeepSpeed and transformers start at 0 and lose the first step.)
* The decay starts at 1 right after the warm-up and would arrive at `min_ratio` one step *after* the last one, so that
  the last step still learns.

See also: `rlhf/deepspeed/arithmetic.py`, DeepSpeed's shapes, which follow its conventions instead.
"""

from __future__ import annotations

import math


def learning_rate_multiplier(
    step: int, *, kind: str, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0
) -> float:
    """What to multiply the learning rate by at `step`.

    Args:
        step: optimizer steps taken before this one.
        kind: "constant", "linear" or "cosine", after the warm-up.
        total_steps: length of the run, warm-up included; beyond it the multiplier stays where the decay arrived.
        warmup_steps: length of the linear warm-up; 0 for none.
        min_ratio: where "linear" and "cosine" arrive, as a share of the full rate.
    """
    _check(step, total_steps=total_steps, warmup_steps=warmup_steps, min_ratio=min_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * _remaining(kind, progress)


def _remaining(kind: str, progress: float) -> float:
    """The share of the decay still ahead, 1 at progress 0 and 0 at progress 1 (a constant has all of it ahead)."""
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1 - progress
    if kind == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    raise ValueError(f'found schedule "{kind}", expected "constant", "linear" or "cosine"')


def _check(step: int, *, total_steps: int, warmup_steps: int, min_ratio: float) -> None:
    if step < 0:
        raise ValueError(f"found step {step}, expected steps to count from 0")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"found warmup_steps {warmup_steps}, expected 0 to total_steps = {total_steps}")
    if not 0 <= min_ratio <= 1:
        raise ValueError(f"found min_ratio {min_ratio}, expected a share from 0 to 1")
