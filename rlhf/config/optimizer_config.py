"""Settings of AdamW and of the learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rlhf.config.bounds import (
    NonNegative,
    Positive,
    Settings,
    Share,
    ShareBelowOne,
    require,
    require_steps,
    steps_of_setting,
)


class Schedule(StrEnum):
    """Shape of the learning rate after the warm-up; from `warmup_lr` on DeepSpeed's, warm-up included."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    warmup_lr = "warmup_lr"
    warmup_decay_lr = "warmup_decay_lr"
    warmup_cosine_lr = "warmup_cosine_lr"


_OWN_SCHEDULES = (Schedule.constant, Schedule.linear, Schedule.cosine)


@dataclass(kw_only=True)
class OptimizerConfig(Settings):
    """AdamW and its schedule."""

    lr: Positive
    """Learning rate after the warm-up."""
    betas: list[ShareBelowOne] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the two moments."""
    eps: NonNegative = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay; never on biases, norms and other vectors."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them alone."""
    schedule: Schedule = Schedule.linear
    """Shape after the warm-up, over the whole stage."""
    warmup_steps: NonNegative = 0.0
    """Optimizer steps in which the learning rate climbs linearly; below 1, that share of the stage, rounded up."""
    min_ratio: Share = 0.0
    """The schedule ends at this fraction of `lr`."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """For one of DeepSpeed's shapes: its parameters by DeepSpeed's names, where they differ from its defaults; what is
    left out of warmup_num_steps and total_num_steps is `warmup_steps` and the stage's own length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_steps(self.warmup_steps, "warmup_steps")
        numbers = [value for value in self.schedule_options.values() if isinstance(value, float)]
        finite = all(map(math.isfinite, numbers))
        require(finite, f"schedule_options={self.schedule_options}: expected finite numbers.")
        require(len(self.betas) == 2, f"betas={self.betas}: expected two numbers.")
        require(
            self.schedule not in _OWN_SCHEDULES or not self.schedule_options,
            f"schedule_options={self.schedule_options}: schedule={self.schedule} has none.",
        )

    def warmup_of(self, total_steps: int) -> int:
        """The warm-up of a stage of `total_steps`, in steps."""
        return steps_of_setting(self.warmup_steps, total_steps)
