"""The one rule of precision here: arithmetic is done in fp32 or better, whatever dtype the models compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 where it is fp64 already; bf16, fp16, integers and bools are promoted. Same shape."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
