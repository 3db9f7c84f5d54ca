"""Turns samples into batches. The only file that pads.

A batch is as long as its longest row. Sequences are padded on the right; prompts on the left, so that every response
starts in the same column. Masks come from lengths and never from the pad token, which may be the EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.samples import Demonstration, Preference, Prompt
from rlhf.types import PreferenceBatch, PromptBatch, SFTBatch


class Padded(NamedTuple):
    """Rows of one length."""

    values: Tensor  # [B, T], the dtype of the rows
    mask: Tensor  # [B, T] bool, True where a row had a value


def pad(rows: Sequence[NDArray[Any]], fill: float, *, left: bool = False) -> Padded:
    """Bring `rows`, B arrays of any lengths, to the length of the longest with `fill`."""
    lengths = np.array([len(row) for row in rows])
    columns = np.arange(lengths.max())
    mask = columns >= lengths.max() - lengths[:, None] if left else columns < lengths[:, None]
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
    margin = torch.tensor([sample.margin for sample in samples], dtype=torch.float32)
    return PreferenceBatch(input_ids=tokens.values.long(), attention_mask=tokens.mask, margin=margin)


def collate_prompts(samples: Sequence[Prompt], sample_ids: Sequence[int], *, pad_id: int) -> PromptBatch:
    """B prompts, left padded; `sample_ids` are B numbers that seed the sampling of each row."""
    tokens = pad([sample.input_ids for sample in samples], pad_id, left=True)
    return PromptBatch(
        input_ids=tokens.values.long(),
        attention_mask=tokens.mask,
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        prompts=tuple(sample.text for sample in samples),
    )
