"""DeepSpeed's own arithmetic, value for value: learning-rate schedules and batch sizes.

Left out: several parameter groups with learning rates of their own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, NamedTuple

from rlhf.deepspeed.keys import AUTO, integer
from rlhf.deepspeed.reader import Document

TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


# Schedules, with DeepSpeed's names and defaults. Steps count from 0, and a step is the one about to be taken. DeepSpeed
# sets its starting value for step 0 and asks the schedule about the step *before* from then on, so that its warm-ups
# begin with two steps at the lowest rate.


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
    names = [field.name for field in fields(shape)]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise ValueError(f"schedule {kind}: found {', '.join(unknown)}, expected some of {', '.join(names)}")
    own = {"lr": lr, "warmup_num_steps": warmup_steps, "total_num_steps": total_steps}
    given = {name: value for name, value in own.items() if name in names} | dict(options)
    missing = [field.name for field in fields(shape) if field.default is MISSING and field.name not in given]
    if missing:
        raise ValueError(f"schedule {kind}: lacks {', '.join(missing)}")
    return shape(**given)


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSchedule(ABC):
    """The learning rate, and perhaps AdamW's betas, as functions of the step."""

    @abstractmethod
    def lr_at(self, step: int) -> float:
        """Learning rate of `step`."""

    def betas_at(self, step: int) -> tuple[float, float] | None:
        """AdamW's betas at `step`; None where the schedule leaves them alone."""
        return None


@dataclass(frozen=True, kw_only=True)
class _Warmup(DeepSpeedSchedule):
    """A warm-up, by the logarithm of the step or in a line."""

    lr: float
    warmup_num_steps: int = 1000
    warmup_type: str = "log"

    @property
    def _num_steps(self) -> int:
        return max(2, self.warmup_num_steps)

    def _climbed(self, step: int) -> float | None:
        """How far the warm-up has come at `step`, from 0 to 1; None after it."""
        if step == 0:
            return 0.0
        if step - 1 >= self._num_steps:
            return None
        is_log = self.warmup_type == "log"
        return math.log(step) / math.log(self._num_steps) if is_log else (step - 1) / self._num_steps


@dataclass(frozen=True, kw_only=True)
class WarmupLR(_Warmup):
    """From the lowest to the highest rate, then constant."""

    warmup_min_lr: float = 0.0
    warmup_max_lr: float | None = None  # None: the optimizer's learning rate

    def lr_at(self, step: int) -> float:
        """Learning rate of `step`."""
        high, share = self.lr if self.warmup_max_lr is None else self.warmup_max_lr, self._climbed(step)
        return self.warmup_min_lr + (high - self.warmup_min_lr) * (self._left(step) if share is None else share)

    def _left(self, step: int) -> float:
        """What is left of the climb at a step after the warm-up."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class WarmupDecayLR(WarmupLR):
    """The same warm-up, then a line down to the lowest rate at the last step."""

    total_num_steps: int
    warmup_max_lr: float | None = 0.001

    def _left(self, step: int) -> float:
        return max(0.0, (self.total_num_steps - step + 1) / max(1.0, self.total_num_steps - self._num_steps))


@dataclass(frozen=True, kw_only=True)
class WarmupCosineLR(_Warmup):
    """Shares of the optimizer's rate: a warm-up, then half a cosine down to `cos_min_ratio`."""

    total_num_steps: int
    warmup_min_ratio: float = 0.0
    cos_min_ratio: float = 0.0001

    def lr_at(self, step: int) -> float:
        """Learning rate of `step`."""
        if step == 0:
            return 0.0  # also where warmup_min_ratio is above it
        low, share = self.warmup_min_ratio, self._climbed(step)
        if share is not None:
            return self.lr * (low + share * (1.0 - low))
        progress = min(1.0, (step - self._num_steps) / max(1, self.total_num_steps - self._num_steps))
        ratio = self.cos_min_ratio + (1.0 - self.cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2
        return self.lr * max(0.0, ratio)


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
    cycle_second_step_size: float | None = None  # None: the first
    cycle_first_stair_count: int = 0
    cycle_second_stair_count: int | None = None  # None: the first
    decay_step_size: float = 0
    cycle_momentum: bool = True
    cycle_min_mom: float = 0.8
    cycle_max_mom: float = 0.9
    decay_mom_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.cycle_first_step_size <= 0 or self._second < 0:
            raise ValueError(
                f"found cycle_first_step_size {self.cycle_first_step_size} and cycle_second_step_size {self._second}, "
                "expected above 0, and 0 or more"
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

    def betas_at(self, step: int) -> tuple[float, float] | None:
        """AdamW's betas at `step`; None where `cycle_momentum` is off."""
        low, high = self.cycle_min_mom, self.cycle_max_mom
        if step == 0:
            beta1 = low  # DeepSpeed starts at the lower end, and jumps to the upper
        elif step - 1 < self._total:
            beta1 = high - (high - low) * self._height(step)
        else:
            beta1 = high * (1 + self.decay_mom_rate * self._decays(step))
        return (beta1, 0.99) if self.cycle_momentum else None

    def _decays(self, step: int) -> float:
        return (step - self._total) / self.decay_step_size if self.decay_step_size else 0.0

    def _height(self, step: int) -> float:
        """0 at the ends of the cycle and 1 at its peak, climbing in stairs where there are any."""
        first, total = self.cycle_first_step_size, self._total
        peak, here = first / total, 1.0 + step / total - math.floor(1 + step / total)
        climbs, stairs = here <= peak, self.cycle_first_stair_count
        if not climbs and self.cycle_second_stair_count is not None:
            stairs = self.cycle_second_stair_count
        if stairs <= 0:
            return here / peak if climbs else (here - 1) / (peak - 1)
        offset = step % total
        climbed = offset * stairs / first if offset <= first else (total - offset) * stairs / self._second
        return math.floor(climbed) / stairs


SHAPES: dict[str, type[DeepSpeedSchedule]] = {
    "warmup_lr": WarmupLR,
    "warmup_decay_lr": WarmupDecayLR,
    "warmup_cosine_lr": WarmupCosineLR,
    "one_cycle": OneCycle,
    "lr_range_test": LRRangeTest,
}


# Batch sizes.


class Batch(NamedTuple):
    """Sequences in an optimizer step of all ranks, and in one forward of one rank."""

    train: int
    micro: int


def solve_batch(document: Document, own: Batch, *, ranks: int, keep: tuple[str, ...] = ()) -> Batch:
    """The sizes of a stage, solved as DeepSpeed solves them.

    A missing size follows from the others by DeepSpeed's rules; `auto` is the run's own, as far as the others leave it
    free. With no number at all, the run's own sizes stand.

    Args:
        document: the configuration, under present names.
        own: the run's sizes.
        ranks: processes.
        keep: of the two sizes, those that are given elsewhere and stand where the file has no number.

    Raises:
        ValueError: the sizes do not add up; with all numbers.
    """
    if not has_numbers(document):
        return own
    raw = {name: document.content.get(name) for name in (TRAIN, MICRO, STEPS)}
    raw |= {name: AUTO for name in keep if raw[name] is None}
    numbers = {name: _size(document, name) for name, value in raw.items() if value not in (None, AUTO)}
    sizes = _solve(numbers, raw, own=own, ranks=ranks, fixed_micro=MICRO in keep)
    steps = numbers.get(STEPS, max(1, sizes.train // (sizes.micro * ranks)) if sizes.micro else 1)
    if sizes.micro < 1 or sizes.train != sizes.micro * steps * ranks:
        raise ValueError(_does_not_add_up(document, numbers, sizes=sizes, steps=steps, ranks=ranks))
    return sizes


def has_numbers(document: Document) -> bool:
    """Whether any of the three sizes is given as a number."""
    return any(document.content.get(name) not in (None, AUTO) for name in (TRAIN, MICRO, STEPS))


def _size(document: Document, name: str) -> int:
    where = document.where((name,))
    size = integer(document.content[name], where=where)
    if size < 1:
        raise ValueError(f"{where}={size}: expected 1 or more.")
    return size


def _solve(numbers: dict[str, int], raw: dict[str, Any], *, own: Batch, ranks: int, fixed_micro: bool) -> Batch:
    train, micro, steps = numbers.get(TRAIN), numbers.get(MICRO), numbers.get(STEPS)
    if train is not None and micro is not None:
        return Batch(train, micro)
    if train is not None:
        if steps is None and AUTO in (raw[MICRO], raw[STEPS]):
            return Batch(train, own.micro if fixed_micro else _largest_that_divides(train // ranks, own.micro))
        return Batch(train, train // ranks // (steps or 1))
    if steps is not None:
        micro = own.micro if micro is None else micro
        return Batch(micro * steps * ranks, micro)
    assert micro is not None, "one of the three is a number"
    return Batch(own.train if AUTO in (raw[TRAIN], raw[STEPS]) else micro * ranks, micro)


def _largest_that_divides(total: int, limit: int) -> int:
    return next((size for size in range(min(limit, total), 0, -1) if total % size == 0), 0)


def _does_not_add_up(document: Document, numbers: dict[str, int], *, sizes: Batch, steps: int, ranks: int) -> str:
    places = ", ".join(f"{name}={size}" for name, size in numbers.items())
    if not sizes.micro:
        return f"{document.name}: {places}: is less than one sequence in each of {steps} x {ranks} (steps x ranks)."
    fitting = sizes.train / (sizes.micro * steps)
    hint = f" These numbers are for launch.ranks={int(fitting)}." if fitting >= 1 and fitting == int(fitting) else ""
    return (
        f"{document.name}: {places}: expected {TRAIN} = {MICRO} x {STEPS} x ranks, found {sizes.train} and "
        f"{sizes.micro} x {steps} x {ranks}.{hint} Leave one of the three out, or write auto, so that it follows."
    )
