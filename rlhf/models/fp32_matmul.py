"""Which library multiplies fp32 matrices on a CPU: MKL, which torch takes, or oneDNN, which is faster on some.

On an AMD EPYC with AVX-512 MKL reaches 100 GFLOP/s a core and oneDNN 230, with an error of the same size: a step of
training takes 0.57 of the time, decoding 0.75. `torch.backends.mkldnn.matmul.fp32_precision = "bf16"` is the only
switch for that. It allows a CPU to round to bf16 inside, which those with AMX do; so a product is compared with fp64
first. Nothing is timed: a run that is resumed on such a machine, and every rank, gets the same answer. Resumed on
another kind of CPU, a run goes on with other last bits, whatever multiplies there.

Attention stays with MKL, since SDPA multiplies small matrices one by one, for which oneDNN takes five times as long
(`cpu_attention.py`). So do models less than `_WIDE` wide.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from rlhf.runtime.dist import World, max_over_ranks

log = logging.getLogger(__name__)

_ONEDNN, _MKL = "bf16", "none"
_WIDE = 256
_LARGEST_ERROR = 1e-5
"""Relative; sums in fp32 are off by 4e-7, and rounding to TF32 or bf16 by 3e-4 and more."""
_CPUINFO = Path("/proc/cpuinfo")


_matmul: Any = cast(Any, torch.backends.mkldnn).matmul


def multiply_with_mkl() -> None:
    """As torch does by itself."""
    _matmul.fp32_precision = _MKL


def multiply_with_onednn(width: int, *, world: World) -> bool:
    """Leave fp32 products to oneDNN from now on, if every rank's CPU gains by it and loses nothing.

    Args:
        width: D of the model that is about to compute.
        world: this rank among the others; all must call.

    Returns:
        Whether they are.
    """
    if width < _WIDE or world.device.type != "cpu" or _is_on():
        return _is_on()
    suits = _mkl_is_slow() and _relative_error() < _LARGEST_ERROR
    if bool(max_over_ranks(torch.tensor(int(not suits)))):
        return False
    _matmul.fp32_precision = _ONEDNN
    log.info("fp32 matrices are multiplied by oneDNN, which is faster on this CPU (engine.fast_fp32_matmul)")
    return True


def _is_on() -> bool:
    return bool(_matmul.fp32_precision == _ONEDNN)


def _mkl_is_slow() -> bool:
    """True on AMD's CPUs with AVX-512, the only ones of another maker for which oneDNN has the switch."""
    vendor = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    return "AuthenticAMD" in vendor and bool(torch.cpu._is_avx512_supported())


def _relative_error() -> float:
    """Of oneDNN's product of two matrices of random numbers."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 512, generator=generator) for rows in (64, 256))
    with _switched(_ONEDNN):
        found = a @ b.T
    exact = a.double() @ b.double().T
    return float((found - exact).norm() / exact.norm())


@contextmanager
def _switched(precision: str) -> Iterator[None]:
    before = _matmul.fp32_precision
    _matmul.fp32_precision = precision
    try:
        yield
    finally:
        _matmul.fp32_precision = before


def with_mkl(attention: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """An attention function of transformers with MKL, forward and backward."""
    if not _is_on():
        return attention(*args, **kwargs)
    with _switched(_MKL):
        output, weights = attention(*args, **kwargs)
    node = output.grad_fn  # of views and copies of what the kernel gave; its own is below them
    while node is not None and "Attention" not in node.name():
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    if node is not None:  # hooks right before and after this node of backward
        node.register_prehook(lambda *_: multiply_with_mkl())
        node.register_hook(lambda *_: setattr(_matmul, "fp32_precision", _ONEDNN))
    return output, weights
