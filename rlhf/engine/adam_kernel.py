"""AdamW's update of flat pieces of parameters, in tiles that stay in cache between the casts around it.

PyTorch's fused kernel wants everything in fp32. A tile of gradients (and of bf16 moments) is cast into scratch memory,
updated, and handed on while it is still in cache, so a whole fp32 copy exists nowhere and main memory is passed once.

[Note: bits] The kernel rounds the elements after the last multiple of its vector length differently. Pieces and tiles
are therefore cut at multiples of 64 elements, counted from the first of a parameter's rows on this rank: then every
tiling, every number of threads and every tier on one kind of processor give the same bits.

Left out: where pieces rest (`tiers/homes.py`, `tiers/home_nvme.py`), and clipping.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.config.optimizer_config import OptimizerConfig

VECTOR_ELEMENTS = 64  # elements; see [Note: bits]
_CPU_TILE = 1 << 19  # elements for each thread: casts and update share the cache, calls cost little beside them
_CUDA_TILE = 1 << 24  # elements: 64 MB of scratch for each cast


class ParameterSlice(NamedTuple):
    """Elements of one parameter's rows on this rank, flat, with all that their update needs."""

    name: str
    start: int  # of the first element, a multiple of `VECTOR_ELEMENTS`
    decays: bool
    step: Tensor  # [] fp32, updates of the parameter so far, this one included
    weight: Tensor  # [n] fp32
    gradient: Tensor  # [n] fp32 or narrower
    exp_avg: Tensor  # [n] fp32 or bf16
    exp_avg_sq: Tensor  # [n] as `exp_avg`

    def cut(self, start: int, stop: int) -> ParameterSlice:
        """Elements [start, stop) of it."""
        if stop - start == self.weight.numel():
            return self
        tensors = (tensor[start:stop] for tensor in self[4:])
        return ParameterSlice(self.name, self.start + start, self.decays, self.step, *tensors)


class AdamKernel:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2) on one device."""

    def __init__(self, config: OptimizerConfig, device: torch.device, *, limit: int = sys.maxsize) -> None:
        """Set up for one device.

        Args:
            config: betas, eps and decay are used here.
            device: where all pieces are.
            limit: largest tile, in elements.
        """
        self._config = config
        self._device = device
        self._limit = max(limit // VECTOR_ELEMENTS * VECTOR_ELEMENTS, VECTOR_ELEMENTS)
        self._scratch: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(
        self, pieces: Sequence[ParameterSlice], *, lr: float, scale: float, betas: Sequence[float] | None = None
    ) -> Iterator[list[ParameterSlice]]:
        """Update in place, a tile at a time.

        Args:
            pieces: what to update.
            lr: learning rate.
            scale: factor on every gradient; the gradients themselves stay as they are, or become useless.
            betas: of this step, where a schedule cycles them.

        Yields:
            The pieces of each tile after its update.
        """
        betas = betas or self._config.betas
        for tile in _tiles(pieces, self._tile(pieces, scale=scale)):
            for decays, decay in ((True, self._config.weight_decay), (False, 0.0)):
                same_decay = [piece for piece in tile if piece.decays == decays]
                self._call(same_decay, lr=lr, decay=decay, scale=scale, betas=betas)
            yield tile

    def _tile(self, pieces: Sequence[ParameterSlice], *, scale: float) -> int:
        on_cpu = self._device.type == "cpu"
        casts = any(_is_cast(tensor) for piece in pieces for tensor in piece[5:])
        if not casts and (scale == 1 or not on_cpu):  # nothing to keep in cache: one multi-tensor call
            return self._limit
        return min(_CPU_TILE * torch.get_num_threads() if on_cpu else _CUDA_TILE, self._limit)

    def _call(
        self, pieces: list[ParameterSlice], *, lr: float, decay: float, scale: float, betas: Sequence[float]
    ) -> None:
        if not pieces:
            return
        # On the CPU the kernel writes scaled gradients back: a pass over memory, unless it is over scratch.
        scales_in_place = scale != 1 and self._device.type == "cpu"
        gradients = self._in_fp32("gradient", [piece.gradient for piece in pieces], copy=scales_in_place)
        exp_avg = self._in_fp32("exp_avg", [piece.exp_avg for piece in pieces])
        exp_avg_sq = self._in_fp32("exp_avg_sq", [piece.exp_avg_sq for piece in pieces])
        beta1, beta2 = betas
        torch._fused_adamw_(
            [piece.weight for piece in pieces],
            gradients,
            exp_avg,
            exp_avg_sq,
            [],
            [piece.step for piece in pieces],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=self._config.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=None if scale == 1 else torch.full((), 1 / scale, device=self._device),
        )
        for piece, mean, square in zip(pieces, exp_avg, exp_avg_sq, strict=True):
            if mean is not piece.exp_avg:
                piece.exp_avg.copy_(mean)
                piece.exp_avg_sq.copy_(square)

    def _in_fp32(self, role: str, tensors: list[Tensor], *, copy: bool = False) -> list[Tensor]:
        """The tensors themselves where they are fp32, else casts in scratch memory; with `copy`, all in scratch."""
        if not copy and not any(_is_cast(tensor) for tensor in tensors):
            return tensors
        needed = sum(_padded(tensor.numel()) for tensor in tensors)
        known = self._scratch.get(role)
        if known is None or known.numel() < needed:
            known = self._scratch[role] = torch.empty(needed, device=self._device)
        casts, at = [], 0
        for tensor in tensors:
            casts.append(known[at : at + tensor.numel()])
            at += _padded(tensor.numel())
        torch._foreach_copy_(casts, tensors)
        return casts


def _tiles(pieces: Sequence[ParameterSlice], size: int) -> Iterator[list[ParameterSlice]]:
    """The pieces in order, cut so that none of the lists has more than `size` elements."""
    tile: list[ParameterSlice] = []
    room = size
    for piece in pieces:
        start, count = 0, piece.weight.numel()
        while start < count:
            stop = min(start + room, count)
            tile.append(piece.cut(start, stop))
            room -= _padded(stop - start)
            start = stop
            if room <= 0:
                yield tile
                tile, room = [], size
    if tile:
        yield tile


def _is_cast(tensor: Tensor) -> bool:
    return tensor.dtype != torch.float32


def _padded(count: int) -> int:
    return -(-count // VECTOR_ELEMENTS) * VECTOR_ELEMENTS
