"""Number types with bounds for settings, and arithmetic on batch sizes and steps.

`lr: Positive` is finite and above 0; `top_p: Annotated[float, Bounds(0, 1, above=True)]` is above 0 and at most 1.
A setting may be null or a list of such numbers, too. Imports nothing but the standard library.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from enum import Enum
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints


@dataclass(frozen=True)
class Bounds:
    """Finite numbers between two others."""

    low: float
    high: float = math.inf
    above: bool = False
    """Exclude `low` itself."""
    below: bool = False
    """Exclude `high` itself."""

    def hold(self, value: float) -> bool:
        """Whether `value` is within the bounds; NaN and infinities never are."""
        high_enough = value > self.low if self.above else value >= self.low
        low_enough = value < self.high if self.below else value <= self.high
        return high_enough and low_enough and is_finite(value)

    def __str__(self) -> str:
        """As in `expected above 0, at most 1`."""
        if self.high == math.inf:
            return f"a number above {self.low:g}" if self.above else f"{self.low:g} or more"
        if not self.above and not self.below:
            return f"{self.low:g} to {self.high:.15g}"
        low, high = ("above" if self.above else "at least"), ("below" if self.below else "at most")
        return f"{low} {self.low:g}, {high} {self.high:g}"


def is_finite(value: float) -> bool:
    """Whether torch can hold `value`: 64 bits for a whole number."""
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


Natural = Annotated[int, Bounds(0)]
Count = Annotated[int, Bounds(1)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
NonNegative = Annotated[float, Bounds(0)]
Positive = Annotated[float, Bounds(0, above=True)]
Share = Annotated[float, Bounds(0, 1)]
ShareBelowOne = Annotated[float, Bounds(0, 1, below=True)]
ShareAboveZero = Annotated[float, Bounds(0, 1, above=True)]


class Settings:
    """A group of settings, whose numbers keep their bounds."""

    def __post_init__(self) -> None:
        for name, bounds in bounds_of(type(self)).items():  # type: ignore[arg-type]  # classes are hashable
            value = getattr(self, name)
            for number in value if isinstance(value, list) else [value]:
                if number is None or str(number).startswith("${"):  # the latter will be what it stands for
                    continue
                if not isinstance(number, int | float) or not bounds.hold(number):
                    endless = isinstance(number, int | float) and not is_finite(number) and bounds.high == math.inf
                    raise ValueError(f"{name}={value}: expected {bounds}{', and finite' if endless else ''}.")


@cache
def bounds_of(cls: type) -> dict[str, Bounds]:
    """The bounds of a group's numbers, by name."""
    hints = get_type_hints(cls, include_extras=True)
    found = {field.name: _bounds(hints[field.name]) for field in fields(cls)}
    return {name: bounds for name, bounds in found.items() if bounds is not None}


def _bounds(hint: Any) -> Bounds | None:
    named = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Bounds)]
    return next((bounds for bounds in (*named, *map(_bounds, get_args(hint))) if bounds is not None), None)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


def require_steps(value: float, name: str) -> None:
    """Raise ValueError unless `value` can be read by `steps_of_setting`."""
    require(
        value < 1 or float(value).is_integer(),
        f"{name}={value}: expected 0 or more: below 1 a share of the stage's steps, from 1 on a whole number of them.",
    )


def steps_of_setting(value: float, total_steps: int) -> int:
    """The steps that a setting means: from 1 on that many, below 1 that share of `total_steps`, rounded up.

    Rounded up as transformers rounds its warm-up, so that no share but 0 is no step; but what is rounded is the product
    of the decimal numbers that were written: 0.07 of 100 is 7, where the floats make 7.000000000000001 and so 8.
    """
    if value >= 1 or value == 0:
        return int(value)
    return max(1, math.ceil(round(value * total_steps, 6)))


def divisible(total: int, *, by: int, names: str) -> int:
    """`total // by`, or a ValueError that names both settings and the nearest totals that divide."""
    lower, upper = total // by * by, -(-total // by) * by
    near = " or ".join(str(size) for size in dict.fromkeys((lower or upper, upper)))
    require(lower == total, f"{names}: {total} is not a multiple of {by}; use {near}.")
    return total // by


@dataclass(frozen=True)
class MicroBatchLimit:
    """The most that goes through a model at once: rows, and tokens, padding included. One row is always allowed."""

    rows: int
    """Sequences, or pairs of them."""
    tokens: int | None = None
    """None leaves them to the rows."""

    def rows_of(self, width: int) -> int:
        """How many rows of `width` tokens there may be."""
        return self.rows if self.tokens is None else max(1, min(self.rows, self.tokens // width))


def accumulation(global_batch_size: int, *, limit: MicroBatchLimit, ranks: int, name: str) -> int | None:
    """Micro-batches per optimizer step and rank, None where lengths decide; raises ValueError if they do not divide."""
    if limit.tokens is not None:
        divisible(global_batch_size, by=ranks, names=f"{name} by ranks ({ranks})")
        return None
    names = f"{name} by ranks x micro_batch_size ({ranks} x {limit.rows})"
    return divisible(global_batch_size, by=ranks * limit.rows, names=names)


def as_plain(config: Any) -> dict[str, Any]:
    """A configuration as dictionaries, lists, numbers and strings."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.value if isinstance(value, Enum) else value
