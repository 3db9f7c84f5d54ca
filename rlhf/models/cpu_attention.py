"""The SDPA attention of transformers, on a CPU made faster where PyTorch's kernel is slow.

A decoding step has one query for every head. In bf16 (an AMD EPYC with AVX-512 bf16, 32 rows of 64 columns, 4 heads)
the kernel needs 0.70 ms for one query and 0.38 ms for two equal ones, so one is doubled. Without a mask,
transformers leaves grouped queries to the kernel, which takes their heads one by one: 1.48 ms in place of 0.33 for 9
heads on 3; so it gets a mask, of zeros. A mask of booleans would be made one of numbers anew in each layer.
Two batched matmuls are no faster in fp32, and in bf16 they round scores, too. See also: `fp32_matmul.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.models.fp32_matmul import with_mkl
from rlhf.models.padding_free import SequenceMasks, expect_no_row, sequence_masks

_sdpa, _sdpa_mask = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
_NAMES = ("query", "key", "value", "attention_mask")
"""What models pass by name or place."""


def speed_up_attention() -> None:
    """Take this for "sdpa" from now on; with several queries, only the library that multiplies differs."""
    ALL_ATTENTION_FUNCTIONS.register("sdpa", _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", _mask)


def _attention(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Called with queries `[N, H, T, width of a head]`, keys, values and a mask; returns `[N, T, H, width]`."""
    known = dict(zip(_NAMES, args, strict=False)) | kwargs
    query, key, mask = known["query"], known["key"], known["attention_mask"]
    if isinstance(mask, SequenceMasks):
        return mask.attend(partial(with_mkl, _sdpa, module), known)
    expect_no_row(module)
    if query.shape[2] > 1 or query.device.type != "cpu" or torch.is_grad_enabled():
        return with_mkl(_sdpa, module, **known)
    if query.shape[1] > key.shape[1]:
        if known["attention_mask"] is None:
            known["attention_mask"] = query.new_zeros(1, 1, 1, key.shape[2])
    elif query.dtype is torch.bfloat16:
        known |= {"query": query.repeat(1, 1, 2, 1), "is_causal": False}
    output, weights = with_mkl(_sdpa, module, **known)
    return output[:, :1], weights


def _mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | SequenceMasks | None:
    """`[N, 1, T, columns]`: True where a token sees another; of one token, 0 there and else minus infinity."""
    masks = sequence_masks(_sdpa_mask, kwargs)
    if masks is not None:
        return masks
    mask: Tensor | None = _sdpa_mask(*args, dtype=dtype, **kwargs)
    if mask is None or mask.shape[2] > 1 or mask.device.type != "cpu":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
