"""Which type the working weights have.

Left out: everything fp32 whatever the answer is here: master weights, moments, gradient sums and their reductions.
"""

from __future__ import annotations

import torch

from rlhf.config.engine_config import Precision


def working_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of the weights that forward and backward use on `device`.

    `auto` asks what the hardware multiplies natively and never measures, so that every run on a machine, and every
    rank on machines of one kind, gets the same answer.
    """
    if precision == Precision.auto:
        return torch.bfloat16 if multiplies_bf16(device) else torch.float32
    return {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}[precision]


def multiplies_bf16(device: torch.device) -> bool:
    """True when `device` has instructions for bf16 products, and need not emulate them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
