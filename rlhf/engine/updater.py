"""An optimizer step: clip, update, advance the schedule, or skip the step because a gradient is not finite."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf.algorithms.schedules import learning_rate_multiplier
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.deepspeed.arithmetic import SHAPES, DeepSpeedSchedule, deepspeed_schedule
from rlhf.engine.adam_kernel import AdamGroup
from rlhf.engine.adamw import AdamW
from rlhf.engine.ema import WeightAverage
from rlhf.engine.gradients import GradientNorm, Gradients
from rlhf.engine.loss_scale import LossScale
from rlhf.runtime.errors import RunError

logger = logging.getLogger(__name__)

AdamGroups = Mapping[str, AdamGroup]
"""The settings of each parameter by its name."""


class StepResult(NamedTuple):
    """What an optimizer step did; the same on every rank."""

    grad_norm: float  # before clipping; not finite on a skipped step
    lr: float
    skipped: bool
    lora_lr: float | None = None  # where adapters have a rate of their own
    loss_scale: float | None = None  # with fp16 only
    is_search: bool = False  # skipped because fp16's loss scale was still being found

    def metrics(self, name: str) -> dict[str, float]:
        """The metrics of a step of the model `name`."""
        found = {f"{name}/grad_norm": self.grad_norm, f"{name}/lr": self.lr, f"{name}/skipped_steps": self.skipped}
        if self.lora_lr is not None:
            found |= {f"{name}/lora_lr": self.lora_lr}
        if self.loss_scale is not None:
            found |= {f"{name}/loss_scale": self.loss_scale, f"{name}/scale_search_steps": self.is_search}
        return {key: float(value) for key, value in found.items()}


class Updater:
    """Turns collected gradients into optimizer steps."""

    def __init__(
        self,
        optimizer: AdamW,
        gradients: Gradients,
        *,
        config: OptimizerConfig,
        total_steps: int,
        max_skipped_steps: int,
        loss_scale: LossScale,
    ) -> None:
        self.optimizer = optimizer
        self.gradients = gradients
        self.loss_scale = loss_scale
        self.average: WeightAverage | None = None  # of the weights, once they are there
        self.steps_taken = 0  # without skipped ones, as in DeepSpeed: they do not use up a warm-up
        self._skipped_in_a_row = 0
        self._config = config
        self._total_steps = total_steps
        self._max_skipped_steps = max_skipped_steps
        self._deepspeed_schedule: DeepSpeedSchedule | None = None
        if config.schedule in SHAPES:
            self._deepspeed_schedule = deepspeed_schedule(
                config.schedule,
                lr=config.lr,
                warmup_steps=config.warmup_of(total_steps),
                total_steps=total_steps,
                options=config.schedule_options,
            )

    def reduce_norm(self) -> GradientNorm:
        """The gradient norm that all ranks agree on, of the loss as it was before it was scaled."""
        found = self.gradients.reduce_norm()  # a collective
        return found._replace(norm=found.norm / self.loss_scale.value)

    def finish(
        self, gradients: GradientNorm, *, skip: bool, groups: AdamGroups | None = None, clip: float = 1.0
    ) -> StepResult:
        """Clip, update and clear the gradients; with `skip`, only clear them. The caller updates the loss scale.

        Args:
            gradients: what `reduce_norm` returned.
            skip: a gradient is not finite.
            groups: settings of each parameter, for this step; None follows the configuration and its schedule.
            clip: the factor on gradients that belongs to `groups`.

        Raises:
            RunError: `engine.max_skipped_steps` steps in a row were skipped, or a disk failed on some rank.
        """
        norm, touched = gradients
        scale = self.loss_scale
        result = StepResult(
            norm,
            self.lr,
            skip,
            lora_lr=None if self._config.lora_lr is None else self.lr * self._config.lora_factor,
            loss_scale=scale.value if scale.is_used else None,
            is_search=skip and scale.is_searching,
        )
        if not skip:
            # The optimizer applies the factor as it reads each gradient: no pass over memory for clipping.
            factor = (clip if groups else self._clip(norm)) / scale.value
            self.optimizer.step(touched, lr=result.lr, scale=factor, betas=self.betas, groups=groups)
            self.steps_taken += 1
            if self.average is not None:
                self.average.update()
        self.gradients.clear()
        self._count(skipped=skip, norm=norm)
        return result

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        config, schedule = self._config, self._deepspeed_schedule
        if schedule is not None:
            return schedule.lr_at(self.steps_taken)
        return config.lr * learning_rate_multiplier(
            self.steps_taken,
            kind=config.schedule,
            total_steps=self._total_steps,
            warmup_steps=config.warmup_of(self._total_steps),
            min_ratio=config.min_ratio,
        )

    @property
    def betas(self) -> tuple[float, float] | None:
        """AdamW's betas of the next step where DeepSpeed's OneCycle moves them; None: those of the settings."""
        schedule = self._deepspeed_schedule
        return None if schedule is None else schedule.betas_at(self.steps_taken)

    def counters(self) -> dict[str, Any]:
        """All that a resumed run needs besides tensors."""
        return {
            "steps_taken": self.steps_taken,
            "skipped_in_a_row": self._skipped_in_a_row,
            "loss_scale": self.loss_scale.state_dict(),
        }

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Continue from `counters()`; the learning rate follows from them."""
        self.steps_taken = counters["steps_taken"]
        self._skipped_in_a_row = counters["skipped_in_a_row"]
        self.loss_scale.load_state_dict(counters["loss_scale"])

    def _clip(self, norm: float) -> float:
        """The factor that brings the gradients down to `optimizer.max_grad_norm`, as in `clip_grad_norm_`."""
        limit = self._config.max_grad_norm
        return min(1.0, limit / (norm + 1e-6)) if limit else 1.0

    def _count(self, *, skipped: bool, norm: float) -> None:
        if not skipped:
            self._skipped_in_a_row = 0
            return
        if self.loss_scale.can_fall:
            return  # normal while fp16's scale is being found; `LossScale.update` logs it
        logger.warning("a step was skipped, after %d taken: the gradient norm is %s", self.steps_taken, norm)
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self._max_skipped_steps:
            raise RunError(
                f"The gradient was not finite in {self._skipped_in_a_row} steps in a row (engine.max_skipped_steps="
                f"{self._max_skipped_steps}){self.loss_scale.limit}. Lower the learning rate, set engine.precision="
                "fp32, or look at the data of these steps; the weights are those before the first of them."
            )
