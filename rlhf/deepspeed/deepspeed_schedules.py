"""DeepSpeed's learning-rate schedules, value for value, as functions of the step.

Steps count from 0, and a step is the one about to be taken. DeepSpeed sets its starting value for step 0 and asks the
schedule about the step *before* from then on, so that its warm-ups begin with two steps at the lowest rate. The fields
have DeepSpeed's names and defaults. Left out: several parameter groups with rates of their own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, NamedTuple


class Betas(NamedTuple):
    """AdamW's two decays at a step."""

    beta1: float
    beta2: float


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSchedule(ABC):
    """The learning rate, and perhaps AdamW's betas, as functions of the step."""

    @abstractmethod
    def lr_at(self, step: int) -> float:
        """Learning rate of `step`."""

    def betas_at(self, step: int) -> Betas | None:
        """AdamW's betas at `step`, or None where the schedule leaves them alone."""
        return None


def deepspeed_schedule(
    kind: str, *, lr: float, warmup_steps: int, total_steps: int, options: Mapping[str, Any]
) -> DeepSpeedSchedule:
    """The schedule that `options` describe.

    Args:
        kind: a key of `SHAPES`.
        lr: the optimizer's learning rate, for shapes that scale it.
        warmup_steps: stands in for `warmup_num_steps` where `options` do not name it.
        total_steps: stands in for `total_num_steps`.
        options: fields of the shape.

    Raises:
        ValueError: an option that the shape does not have, lacks, or cannot use.
    """
    shape = SHAPES[kind]
    own: dict[str, Any] = {"lr": lr, "warmup_num_steps": warmup_steps, "total_num_steps": total_steps}
    names = [field.name for field in fields(shape)]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise ValueError(f"schedule {kind}: found {', '.join(unknown)}, expected some of {', '.join(names)}")
    given = {name: value for name, value in own.items() if name in names} | dict(options)
    missing = [field.name for field in fields(shape) if field.default is MISSING and field.name not in given]
    if missing:
        raise ValueError(f"schedule {kind}: lacks {', '.join(missing)}")
    return shape(**given)


def _warmed(step: int, *, num_steps: int, kind: str) -> float:
    """The share of a warm-up at the step before `step`, which is still within it."""
    return math.log(step) / math.log(num_steps) if kind == "log" else (step - 1) / num_steps


@dataclass(frozen=True, kw_only=True)
class WarmupLR(DeepSpeedSchedule):
    """From the lowest to the highest rate in a warm-up, by the logarithm of the step or in a line; then constant."""

    lr: float
    warmup_num_steps: int = 1000
    warmup_min_lr: float = 0.0
    warmup_max_lr: float | None = None  # None: the optimizer's learning rate
    warmup_type: str = "log"

    def lr_at(self, step: int) -> float:
        """Learning rate of `step`."""
        high = self.lr if self.warmup_max_lr is None else self.warmup_max_lr
        share = self._share(step, max(2, self.warmup_num_steps)) if step else 0.0
        return self.warmup_min_lr + (high - self.warmup_min_lr) * share

    def _share(self, step: int, num_steps: int) -> float:
        return _warmed(step, num_steps=num_steps, kind=self.warmup_type) if step - 1 < num_steps else 1.0


@dataclass(frozen=True, kw_only=True)
class WarmupDecayLR(WarmupLR):
    """The same warm-up, then a line down to the lowest rate at the last step."""

    total_num_steps: int
    warmup_max_lr: float | None = 0.001

    def _share(self, step: int, num_steps: int) -> float:
        if step - 1 < num_steps:
            return _warmed(step, num_steps=num_steps, kind=self.warmup_type)
        return max(0.0, (self.total_num_steps - step + 1) / max(1.0, self.total_num_steps - num_steps))


@dataclass(frozen=True, kw_only=True)
class WarmupCosineLR(DeepSpeedSchedule):
    """Shares of the optimizer's rate: a warm-up, then half a cosine down to `cos_min_ratio`."""

    lr: float
    total_num_steps: int
    warmup_num_steps: int = 1000
    warmup_min_ratio: float = 0.0
    cos_min_ratio: float = 0.0001
    warmup_type: str = "log"

    def lr_at(self, step: int) -> float:
        """Learning rate of `step`."""
        return self.lr * self._ratio(step, max(2, self.warmup_num_steps)) if step else 0.0

    def _ratio(self, step: int, num_steps: int) -> float:
        if step - 1 < num_steps:
            low = self.warmup_min_ratio
            return low + _warmed(step, num_steps=num_steps, kind=self.warmup_type) * (1.0 - low)
        progress = min(1.0, (step - num_steps) / max(1, self.total_num_steps - num_steps))
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2)


@dataclass(frozen=True, kw_only=True)
class LRRangeTest(DeepSpeedSchedule):
    """A rate that only grows, to find the largest that still learns."""

    lr_range_test_min_lr: float = 1e-3
    lr_range_test_step_size: int = 2000
    lr_range_test_step_rate: float = 1.0
    lr_range_test_staircase: bool = False

    def __post_init__(self) -> None:
        if self.lr_range_test_step_size <= 0:
            raise ValueError(f"found lr_range_test_step_size {self.lr_range_test_step_size}, expected 1 or more")

    def lr_at(self, step: int) -> float:
        """Learning rate of `step`."""
        intervals = step / self.lr_range_test_step_size
        grown = math.floor(intervals) if self.lr_range_test_staircase else intervals
        return self.lr_range_test_min_lr * (1 + self.lr_range_test_step_rate * grown)


@dataclass(frozen=True, kw_only=True)
class OneCycle(DeepSpeedSchedule):
    """One climb and descent of the rate (Smith 2018), the first beta going the other way; then a decay."""

    cycle_min_lr: float
    cycle_max_lr: float
    decay_lr_rate: float = 0.0
    cycle_first_step_size: float = 2000
    cycle_second_step_size: float | None = None
    cycle_first_stair_count: int = 0
    cycle_second_stair_count: int | None = None
    decay_step_size: float = 0
    cycle_momentum: bool = True
    cycle_min_mom: float = 0.8
    cycle_max_mom: float = 0.9
    decay_mom_rate: float = 0.0

    def __post_init__(self) -> None:
        first, second = self.cycle_first_step_size, self._second
        if first <= 0 or second < 0:
            raise ValueError(
                f"found cycle_first_step_size {first} and cycle_second_step_size {second}, expected above 0, and 0 or "
                f"more"
            )

    @property
    def _second(self) -> float:
        return self.cycle_first_step_size if self.cycle_second_step_size is None else self.cycle_second_step_size

    @property
    def _total(self) -> float:
        return self.cycle_first_step_size + self._second

    def lr_at(self, step: int) -> float:
        """Learning rate of `step`."""
        if step - 1 < self._total:
            return self.cycle_min_lr + (self.cycle_max_lr - self.cycle_min_lr) * self._height(step)
        return self.cycle_min_lr / (1 + self.decay_lr_rate * self._decays(step))

    def betas_at(self, step: int) -> Betas | None:
        """AdamW's betas at `step`, or None where `cycle_momentum` is off."""
        if not self.cycle_momentum:
            return None
        low, high = self.cycle_min_mom, self.cycle_max_mom
        if step == 0:
            return Betas(low, 0.99)  # DeepSpeed starts at the lower end, and jumps to the upper
        if step - 1 < self._total:
            return Betas(high - (high - low) * self._height(step), 0.99)
        return Betas(high * (1 + self.decay_mom_rate * self._decays(step)), 0.99)

    def _decays(self, step: int) -> float:
        return (step - self._total) / self.decay_step_size if self.decay_step_size else 0.0

    def _height(self, step: int) -> float:
        """0 at the ends of the cycle and 1 at its peak."""
        total, peak = self._total, self.cycle_first_step_size / self._total
        here = 1.0 + step / total - math.floor(1 + step / total)
        climbs = here <= peak
        second = self.cycle_second_stair_count
        stairs = self.cycle_first_stair_count if climbs or second is None else second
        if stairs > 0:
            return math.floor(self._stair(step % total, stairs)) / stairs
        return here / peak if climbs else (here - 1) / (peak - 1)

    def _stair(self, offset: float, stairs: int) -> float:
        if offset <= self.cycle_first_step_size:
            return offset * stairs / self.cycle_first_step_size
        return (self._total - offset) * stairs / self._second


SHAPES: dict[str, type[DeepSpeedSchedule]] = {
    "warmup_lr": WarmupLR,
    "warmup_decay_lr": WarmupDecayLR,
    "warmup_cosine_lr": WarmupCosineLR,
    "one_cycle": OneCycle,
    "lr_range_test": LRRangeTest,
}
