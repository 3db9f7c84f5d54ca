"""AdamW's update of flat slices of parameters, in chunks that stay in cache between the casts around it.

PyTorch's fused kernel wants everything in fp32. A chunk of gradients (and of bf16 moments) is cast into scratch memory,
updated, and handed on while it is still in cache: no whole fp32 copy exists, and main memory is passed over once.

[Note: bits] The kernel rounds the elements after the last multiple of its vector length differently. Slices and chunks
are therefore cut at multiples of 64 elements, counted from the start of a parameter's shard: then every cut, every
number of threads and every state store on one kind of processor give the same bits.

See also: where state is kept (`offload/placement.py`); clipping is part of the `scale` (`updater.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.config.stage_configs import OptimizerConfig
from rlhf.models.lora import is_adapter

VECTOR_ELEMENTS = 64
"""No cut is made between two multiples of it; see [Note: bits]."""
_CPU_CHUNK = 1 << 19  # elements for each thread: casts and update share the cache, calls cost little beside them
CUDA_CHUNK = 1 << 24  # elements: 64 MB of scratch for each cast


class ParameterSlice(NamedTuple):
    """Elements of one parameter's shard, flat, with everything that their update needs."""

    name: str
    start: int  # of the first element in the shard, a multiple of `VECTOR_ELEMENTS`
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
        tensors = (tensor[start:stop] for tensor in (self.weight, self.gradient, self.exp_avg, self.exp_avg_sq))
        return ParameterSlice(self.name, self.start + start, self.decays, self.step, *tensors)


class AdamKernel:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2) on one device."""

    def __init__(self, config: OptimizerConfig, device: torch.device, *, limit: int = sys.maxsize) -> None:
        """Update slices that are on `device`, at most `limit` elements at a time."""
        self._config = config
        self.device = device
        self._limit = max(limit // VECTOR_ELEMENTS * VECTOR_ELEMENTS, VECTOR_ELEMENTS)
        self._scratch: dict[str, Tensor] = {}  # kept: fresh pages would cost more than the casts into them

    @torch.no_grad()
    def update(
        self, slices: Sequence[ParameterSlice], *, lr: float, scale: float, betas: Sequence[float] | None = None
    ) -> Iterator[list[ParameterSlice]]:
        """Update in place, a chunk at a time.

        Args:
            slices: what to update.
            lr: learning rate.
            scale: factor on every gradient; the gradients themselves stay as they are, or become useless.
            betas: of this step, where a schedule cycles them.

        Yields:
            The slices of each chunk after its update.
        """
        config, betas = self._config, betas or self._config.betas
        kinds = [*product((True, False), (False, True) if config.lora_lr else (False,))]
        for chunk in _chunks(slices, self._chunk_size(slices, scale=scale)):
            for decays, adapts in kinds:  # one call for each: on CUDA it is a kernel
                parts = [part for part in chunk if part.decays == decays and self._adapts(part) == adapts]
                rate, decay = lr * config.lora_factor if adapts else lr, config.weight_decay if decays else 0.0
                self._call(parts, lr=rate, decay=decay, scale=scale, betas=betas)
            yield chunk

    def _adapts(self, part: ParameterSlice) -> bool:
        """Whether the rate of adapters is a part's own."""
        return self._config.lora_lr is not None and is_adapter(part.name)

    def _chunk_size(self, slices: Sequence[ParameterSlice], *, scale: float) -> int:
        on_cpu = self.device.type == "cpu"
        casts = any(_is_cast(tensor) for part in slices for tensor in (part.gradient, part.exp_avg, part.exp_avg_sq))
        if not casts and (scale == 1 or not on_cpu):  # nothing to keep in cache: one multi-tensor call
            return self._limit
        return min(_CPU_CHUNK * torch.get_num_threads() if on_cpu else CUDA_CHUNK, self._limit)

    def _call(
        self, slices: list[ParameterSlice], *, lr: float, decay: float, scale: float, betas: Sequence[float]
    ) -> None:
        if not slices:
            return
        # On the CPU the kernel writes scaled gradients back: a pass over memory, unless it is over scratch in cache.
        scales_in_place = scale != 1 and self.device.type == "cpu"
        gradients = self._in_fp32("gradient", [part.gradient for part in slices], copy=scales_in_place)
        exp_avg = self._in_fp32("exp_avg", [part.exp_avg for part in slices])
        exp_avg_sq = self._in_fp32("exp_avg_sq", [part.exp_avg_sq for part in slices])
        beta1, beta2 = betas
        torch._fused_adamw_(
            [part.weight for part in slices],
            gradients,
            exp_avg,
            exp_avg_sq,
            [],
            [part.step for part in slices],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=self._config.eps,
            amsgrad=False,
            maximize=False,
            # The kernel divides by it. On CUDA it is filled there: no wait for the device.
            grad_scale=None if scale == 1 else torch.full((), 1 / scale, device=self.device),
        )
        for part, mean, square in zip(slices, exp_avg, exp_avg_sq, strict=True):
            if mean is not part.exp_avg:  # they were cast: round the new moments back
                part.exp_avg.copy_(mean)
                part.exp_avg_sq.copy_(square)

    def _in_fp32(self, role: str, tensors: list[Tensor], *, copy: bool = False) -> list[Tensor]:
        """The tensors themselves where they are fp32, else casts in scratch memory; with `copy`, all in scratch."""
        if not copy and not any(_is_cast(tensor) for tensor in tensors):
            return tensors
        needed = sum(_padded(tensor.numel()) for tensor in tensors)
        scratch = self._scratch.get(role)
        if scratch is None or scratch.numel() < needed:
            scratch = self._scratch[role] = torch.empty(needed, device=self.device)
        casts, at = [], 0
        for tensor in tensors:
            casts.append(scratch[at : at + tensor.numel()])
            at += _padded(tensor.numel())  # each starts on a vector, as the tensors themselves do
        torch._foreach_copy_(casts, tensors)
        return casts


def _chunks(slices: Sequence[ParameterSlice], size: int) -> Iterator[list[ParameterSlice]]:
    """The slices in order, cut so that none of the lists has more than `size` elements."""
    chunk: list[ParameterSlice] = []
    left = size
    for part in slices:
        start, numel = 0, part.weight.numel()
        while start < numel:
            stop = min(start + left, numel)
            chunk.append(part.cut(start, stop))
            left -= _padded(stop - start)
            start = stop
            if left <= 0:
                yield chunk
                chunk, left = [], size
    if chunk:
        yield chunk


def _is_cast(tensor: Tensor) -> bool:
    return tensor.dtype != torch.float32


def _padded(numel: int) -> int:
    return -(-numel // VECTOR_ELEMENTS) * VECTOR_ELEMENTS
