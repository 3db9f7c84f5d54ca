"""DeepSpeed's three batch sizes: which are given, which follow, and whether they add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf.deepspeed.hjson import Document
from rlhf.deepspeed.values import AUTO, integer

TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@dataclass(frozen=True)
class Batch:
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
    raw = {name: document.content.get(name) for name in (TRAIN, MICRO, STEPS)}
    raw |= {name: AUTO for name in keep if raw[name] is None}
    if not has_numbers(document):
        return own
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
    if micro is None:
        micro = own.micro if steps is not None else 0
    if steps is not None:
        return Batch(micro * steps * ranks, micro)
    from_the_run = AUTO in (raw[TRAIN], raw[STEPS])
    return Batch(own.train if from_the_run else micro * ranks, micro)


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
