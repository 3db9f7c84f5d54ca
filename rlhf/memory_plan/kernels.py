"""What the compiled kernels of a CPU's matrix products take.

oneDNN compiles one for each shape that it meets, and keeps as many as an environment variable says. PyTorch's layer
above it keeps what it has asked for, too, as many as another variable says (`KERNEL_CACHES`).
Their size is that of a buffer for code. It depends on the version of oneDNN, little on the shape: a few are measured.
"""

from __future__ import annotations

import os
from statistics import median

import torch
import torch.nn.functional as F

from rlhf.runtime.process import KERNEL_CACHES, heap_in_use

_CAPACITY_BY_DEFAULT = 1024
_WIDE, _WARM_UP, _TRIALS = 512, 16, 5


def compiled_kernels(dtype: torch.dtype) -> int:
    """Bytes of the full caches of kernels for products in `dtype`.

    If their capacities differ, as if both had the larger. 0 where another library multiplies, as MKL does in fp32, and
    where the C library does not say what is in use.
    """
    matrix = torch.ones(_WIDE, _WIDE, dtype=dtype)
    for _ in range(_WARM_UP):  # MKL sets buffers aside at first, and whenever a product is larger than all before
        F.linear(matrix, matrix)
    sizes = [_kernel(torch.ones(_WIDE - trial, _WIDE, dtype=dtype), matrix) for trial in range(1, _TRIALS)]
    capacity = max(int(os.environ.get(name, _CAPACITY_BY_DEFAULT)) for name in KERNEL_CACHES)
    return capacity * max(0, int(median(sizes)))


def _kernel(rows: torch.Tensor, matrix: torch.Tensor) -> int:
    """Bytes that stay in use after the first product of this shape."""
    before = heap_in_use()
    F.linear(rows, matrix)
    return heap_in_use() - before
