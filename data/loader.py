"""From samples to the batches of each rank and step. The only file that pads.

The rows of a step follow from the seed and the number of the step alone, never from the number of ranks or the size of
a micro-batch. So results do not depend on the machine, and resuming needs nothing but the step.

A batch is as wide as its longest row, rounded up (`width_of`). Sequences are padded on the right; prompts on the left,
so that every response starts in the same column. Masks come from lengths and never from the pad token, which may be the
EOS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.samples import Demonstration, Preference, Prompt
from rlhf.config.bounds import MicroBatchLimit, accumulation, divisible
from rlhf.micro_batches import deal, pieces_by_length
from rlhf.types import EvalBatch, PreferenceBatch, PromptBatch, SFTBatch, width_of

Sample = TypeVar("Sample", bound=Sized)
Batch = TypeVar("Batch")


# ---- samples of any lengths become rectangles


class Padded(NamedTuple):
    """Rows of one length."""

    values: Tensor  # [B, T], the dtype of the rows
    mask: Tensor  # [B, T] bool, True where a row had a value


def pad(rows: Sequence[NDArray[Any]], fill: float, *, left: bool = False) -> Padded:
    """Bring `rows`, B arrays of any lengths, to one width with `fill`."""
    lengths = np.array([len(row) for row in rows])
    columns = np.arange(width_of(lengths.max()))
    mask = columns >= len(columns) - lengths[:, None] if left else columns < lengths[:, None]
    values = np.full(mask.shape, fill, dtype=rows[0].dtype)
    values[mask] = np.concatenate(rows)
    return Padded(torch.from_numpy(values), torch.from_numpy(mask))


def collate_demonstrations(samples: Sequence[Demonstration], pad_id: int) -> SFTBatch:
    """B demonstrations, right padded."""
    tokens = pad([sample.input_ids for sample in samples], pad_id)
    targets = pad([sample.target_mask for sample in samples], False)
    return SFTBatch(input_ids=tokens.values.long(), attention_mask=tokens.mask, target_mask=targets.values)


def collate_preferences(samples: Sequence[Preference], pad_id: int) -> PreferenceBatch:
    """B preferences as 2B sequences, right padded: all chosen ones, then the rejected."""
    tokens = pad([*(sample.chosen for sample in samples), *(sample.rejected for sample in samples)], pad_id)
    targets = pad([sample.targets[side] for side in (0, 1) for sample in samples], False)
    return PreferenceBatch(
        input_ids=tokens.values.long(),
        attention_mask=tokens.mask,
        target_mask=targets.values,
        margin=torch.tensor([sample.margin for sample in samples], dtype=torch.float32),
        reference_logprobs=torch.from_numpy(np.stack([sample.reference for sample in samples], axis=1).reshape(-1)),
    )


def collate_prompts(samples: Sequence[Prompt], sample_ids: Sequence[int], *, pad_id: int) -> PromptBatch:
    """B prompts, left padded; `sample_ids` are B numbers that seed the sampling of each row."""
    tokens = pad([sample.input_ids for sample in samples], pad_id, left=True)
    return PromptBatch(
        input_ids=tokens.values.long(),
        attention_mask=tokens.mask,
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        prompts=tuple(sample.text for sample in samples),
        columns=tuple(sample.columns for sample in samples),
    )


# ---- which rows a step has


@lru_cache(maxsize=4)
def _epoch(num_rows: int, seed: int, *, number: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, number]).permutation(num_rows).tolist()
    return order


def shuffled_rows(num_rows: int, seed: int, *, start: int, count: int) -> list[int]:
    """Row numbers `start` up to `start + count` of an endless stream of shuffled epochs."""
    positions = range(start, start + count)
    return [_epoch(num_rows, seed, number=position // num_rows)[position % num_rows] for position in positions]


@dataclass
class TrainLoader(Generic[Sample, Batch]):
    """For each optimizer step, the micro-batches of this rank.

    An epoch that ends within a step is followed by the next one. The rows of a step are sorted by length, cut into
    micro-batches, the largest first (so that the first step shows whether memory suffices), and dealt to the ranks:
    little padding, equal numbers, similar work. Where `limit` is one of tokens, steps differ in their number.
    """

    samples: Sequence[Sample]
    collate: Callable[[Sequence[Sample]], Batch]
    global_batch_size: int
    limit: MicroBatchLimit
    rank: int
    ranks: int
    seed: int
    steps: int
    step: int = 0
    """Steps handed out so far."""

    def __post_init__(self) -> None:
        assert len(self.samples) > 0, "no samples to train on"
        accumulation(self.global_batch_size, limit=self.limit, ranks=self.ranks, name="global_batch_size")

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Batch]]:
        while self.step < self.steps:
            self.step += 1
            yield self.micro_batches(self.step - 1)

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of this rank in optimizer step `step`, counted from 0."""
        size = self.global_batch_size
        numbers = shuffled_rows(len(self.samples), self.seed, start=step * size, count=size)
        rows = [self.samples[number] for number in numbers]
        pieces = pieces_by_length(torch.tensor(list(map(len, rows))), self.limit, ranks=self.ranks)
        own = deal(pieces, ranks=self.ranks)[self.rank]
        return [self.collate([rows[row] for row in piece.tolist()]) for piece in own]

    def used(self) -> list[Sample]:
        """The samples that the steps of all ranks use, each once."""
        count = min(self.steps * self.global_batch_size, len(self.samples))  # the first epoch has none twice
        return [self.samples[number] for number in shuffled_rows(len(self.samples), self.seed, start=0, count=count)]

    def state_dict(self) -> dict[str, int]:
        """The position to resume from."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from the position in `state`."""
        self.step = state["step"]


def evaluation_batches(
    samples: Sequence[Sample],
    collate: Callable[[Sequence[Sample]], Batch],
    *,
    limit: MicroBatchLimit,
    rank: int,
    ranks: int,
) -> list[EvalBatch[Batch]]:
    """This rank's part of all samples, once each: the same number of batches on every rank.

    A rank that has nothing left to do gets a row of others, of which it counts none.
    """
    if not samples:
        return []
    lengths = torch.tensor(list(map(len, samples)))
    filler = samples[int(lengths.argmin())]
    own = deal(pieces_by_length(lengths, limit, ranks=ranks), ranks=ranks)[rank]
    batches = [[samples[row] for row in piece.tolist()] for piece in own]
    return [EvalBatch(collate(rows or [filler]), len(rows)) for rows in batches]


def evaluation_prompts(samples: Sequence[Prompt], *, rank: int, ranks: int, pad_id: int) -> PromptBatch:
    """This rank's part of all prompts, equally many on every rank: the last ranks repeat some.

    The rows of all ranks, one rank after the other, begin with all prompts in order; `sample_ids` are their numbers.
    """
    each = -(-len(samples) // ranks)
    numbers = range(rank * each, (rank + 1) * each)
    ids = [number % len(samples) for number in numbers]
    batch = collate_prompts([samples[number] for number in ids], ids, pad_id=pad_id)
    own = [given if number < len(samples) else None for given, number in zip(batch.columns, numbers, strict=True)]
    return replace(batch, columns=tuple(own))


@dataclass
class PromptLoader:
    """For each PPO iteration, the prompts that this rank answers.

    Each prompt is repeated `samples_per_prompt` times side by side, and such a group is never divided between ranks.
    """

    samples: Sequence[Prompt]
    rollout_size: int
    samples_per_prompt: int
    rank: int
    ranks: int
    seed: int
    iterations: int
    pad_id: int
    iteration: int = 0
    """Iterations handed out so far."""
    drawn: int = 0
    """Batches of prompts handed out so far: one for each iteration, and those from `further`."""

    def __post_init__(self) -> None:
        assert len(self.samples) > 0, "no prompts to answer"
        group = self.ranks * self.samples_per_prompt
        names = f"ppo.rollout_size by ranks x samples_per_prompt ({self.ranks} x {self.samples_per_prompt})"
        divisible(self.rollout_size, by=group, names=names)

    def __len__(self) -> int:
        return self.iterations

    def __iter__(self) -> Iterator[PromptBatch]:
        while self.iteration < self.iterations:
            self.iteration += 1
            yield self.further()

    def further(self) -> PromptBatch:
        """The next batch of prompts, in the middle of an iteration too; the following ones come after it."""
        self.drawn += 1
        return self.batch(self.drawn - 1)

    def batch(self, number: int) -> PromptBatch:
        """This rank's prompts in the batch `number`, counted from 0; sample ids are unique in the run."""
        count = self.rollout_size // self.samples_per_prompt
        numbers = shuffled_rows(len(self.samples), self.seed, start=number * count, count=count)
        own = range(self.rank * self.rollout_size // self.ranks, (self.rank + 1) * self.rollout_size // self.ranks)
        prompts = [self.samples[numbers[row // self.samples_per_prompt]] for row in own]
        return collate_prompts(prompts, [number * self.rollout_size + row for row in own], pad_id=self.pad_id)

    def state_dict(self) -> dict[str, int]:
        """The position to resume from."""
        return {"iteration": self.iteration, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from the position in `state`."""
        self.iteration, self.drawn = state["iteration"], state["drawn"]
