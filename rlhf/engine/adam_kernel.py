"""AdamW's update of flat slices of parameters, in chunks that stay in cache between the casts around it.

PyTorch's fused kernel wants everything in fp32. A chunk of what is stored otherwise is made fp32 in scratch memory,
updated, and stored again while it is still in cache: no whole fp32 copy exists, and main memory is passed over once.

[Note: bits] The kernel rounds the elements after the last multiple of its vector length differently, and moments in 8
bits share scales. Slices and chunks are therefore cut between blocks of 256 elements, counted from the start of a
parameter's shard: then every cut, every number of threads and every state store on one kind of processor give the same
bits.

See also: how state is stored (`state_format.py`) and where (`offload/placement.py`); clipping is part of the `scale`
(`updater.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.state_format import BLOCK, Packed, Stored
from rlhf.models.lora import is_adapter

_CPU_CHUNK = 1 << 19  # elements for each thread: casts and update share the cache, calls cost little beside them
CUDA_CHUNK = 1 << 24  # elements: 64 MB of scratch for each cast


class ParameterSlice(NamedTuple):
    """Elements of one parameter's shard, flat, with everything that their update needs."""

    name: str
    start: int  # of the first element in the shard, a multiple of `BLOCK`
    decays: bool
    step: Tensor  # [] fp32, updates of the parameter so far, this one included
    weight: Stored  # [n] fp32 or packed
    gradient: Tensor  # [n] fp32 or narrower
    exp_avg: Stored  # [n] fp32, bf16 or packed
    exp_avg_sq: Stored  # [n] as `exp_avg`

    @property
    def numel(self) -> int:
        """Its elements."""
        return self.gradient.numel()

    @property
    def stored(self) -> list[Stored]:
        """All that is read."""
        return [self.weight, self.gradient, self.exp_avg, self.exp_avg_sq]

    def cut(self, start: int, stop: int) -> ParameterSlice:
        """Elements [start, stop) of it."""
        if stop - start == self.numel:
            return self
        weight, _, *moments = (_cut(stored, slice(start, stop)) for stored in self.stored)
        gradient = self.gradient[start:stop]
        return ParameterSlice(self.name, self.start + start, self.decays, self.step, weight, gradient, *moments)


class AdamGroup(NamedTuple):
    """The settings by which some parameters are updated, as in a group of `torch.optim.AdamW`."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


_Ready = tuple[ParameterSlice, Tensor]
"""A slice and its masters in fp32."""


class UpdatedWeights(NamedTuple):
    """Elements of one parameter's shard after an update, flat."""

    name: str
    start: int  # of the first element in the shard
    weight: Tensor  # [n] fp32: the master, or, where masters are split, what the working weight becomes


class AdamKernel:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2) on one device."""

    def __init__(self, config: OptimizerConfig, device: torch.device, *, limit: int = sys.maxsize) -> None:
        """Update slices that are on `device`, at most `limit` elements at a time."""
        self._config = config
        self.device = device
        self._limit = max(limit // BLOCK * BLOCK, BLOCK)
        self._scratch: dict[str, Tensor] = {}  # kept: fresh pages would cost more than the casts into them

    @torch.no_grad()
    def update(
        self,
        slices: Sequence[ParameterSlice],
        *,
        lr: float,
        scale: float,
        betas: Sequence[float] | None = None,
        groups: Mapping[str, AdamGroup] | None = None,
    ) -> Iterator[list[UpdatedWeights]]:
        """Update in place, a chunk at a time.

        Args:
            slices: what to update.
            lr: learning rate.
            scale: factor on every gradient; the gradients themselves stay as they are, or become useless.
            betas: of this step, where a schedule cycles them.
            groups: settings of every parameter by name, instead of `lr`, `betas` and the configuration; gradients are
                then multiplied by `scale` in fp32 before anything else, as `clip_grad_norm_` does, to the bit.

        Yields:
            The weights of each chunk after its update; they are valid until the next one is asked for.
        """
        for chunk in _chunks(slices, self._chunk_size(slices, scale=scale)):
            weights = self._in_fp32("weight", [part.weight for part in chunk])
            ready = [*zip(chunk, weights, strict=True)]
            alike: dict[AdamGroup, list[_Ready]] = {}
            for each in ready:
                group = groups[each[0].name] if groups else self._group(each[0], lr=lr, betas=betas)
                alike.setdefault(group, []).append(each)
            for group, some in alike.items():  # one call for each: on CUDA it is a kernel
                self._call(some, group=group, scale=scale, multiply=groups is not None)
            self._store([(part.weight, weight, part.step) for part, weight in ready])
            yield [UpdatedWeights(part.name, part.start, weight) for part, weight in ready]

    def _group(self, part: ParameterSlice, *, lr: float, betas: Sequence[float] | None) -> AdamGroup:
        """The settings of a parameter by the configuration: adapters may have a rate, and vectors no decay."""
        config, (beta1, beta2) = self._config, betas or self._config.betas
        rate = lr * config.lora_factor if config.lora_lr is not None and is_adapter(part.name) else lr
        return AdamGroup(rate, (beta1, beta2), config.eps, config.weight_decay if part.decays else 0.0)

    def _chunk_size(self, slices: Sequence[ParameterSlice], *, scale: float) -> int:
        on_cpu = self.device.type == "cpu"
        casts = any(_is_cast(stored) for part in slices for stored in part.stored)
        if not casts and (scale == 1 or not on_cpu):  # nothing to keep in cache: one multi-tensor call
            return self._limit
        return min(_CPU_CHUNK * torch.get_num_threads() if on_cpu else CUDA_CHUNK, self._limit)

    def _call(self, ready: list[_Ready], *, group: AdamGroup, scale: float, multiply: bool) -> None:
        """Update slices with the same settings, each with its fp32 weights."""
        slices = [part for part, _ in ready]
        # On the CPU the kernel writes scaled gradients back: a pass over memory, unless it is over scratch in cache.
        scales_in_place = scale != 1 and self.device.type == "cpu" and not multiply
        gradients = self._in_fp32("gradient", [part.gradient for part in slices], copy=scales_in_place)
        exp_avg = self._in_fp32("exp_avg", [part.exp_avg for part in slices])
        exp_avg_sq = self._in_fp32("exp_avg_sq", [part.exp_avg_sq for part in slices])
        if multiply and scale != 1:
            torch._foreach_mul_(gradients, scale)  # the gradients themselves, or scratch: nobody reads them again
            scale = 1.0
        beta1, beta2 = group.betas
        torch._fused_adamw_(
            [weight for _, weight in ready],
            gradients,
            exp_avg,
            exp_avg_sq,
            [],
            [part.step for part in slices],
            lr=group.lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=group.weight_decay,
            eps=group.eps,
            amsgrad=False,
            maximize=False,
            # The kernel divides by it. On CUDA it is filled there: no wait for the device.
            grad_scale=None if scale == 1 else torch.full((), 1 / scale, device=self.device),
        )
        self._store([(part.exp_avg, new, part.step) for part, new in zip(slices, exp_avg, strict=True)])
        self._store([(part.exp_avg_sq, new, part.step) for part, new in zip(slices, exp_avg_sq, strict=True)])

    def _in_fp32(self, role: str, stored: Sequence[Stored], *, copy: bool = False) -> list[Tensor]:
        """The tensors themselves where all are fp32, else fp32 in scratch memory; with `copy`, all in scratch."""
        if not copy and not any(_is_cast(each) for each in stored):
            return [each for each in stored if isinstance(each, Tensor)]
        scratch = self._memory(role, sum(_padded(each) for each in stored))
        casts, plain, at = [], [], 0
        for each in stored:
            whole = scratch[at : at + _padded(each)]
            at += len(whole)  # each starts on a vector, as the tensors themselves do
            casts.append(whole[: _numel(each)])
            if isinstance(each, Packed):
                each.load(whole, self._memory("spare", len(whole))[: len(whole)])
            else:
                plain.append((casts[-1], each))
        if plain:
            torch._foreach_copy_([into for into, _ in plain], [each for _, each in plain])
        return casts

    def _store(self, updated: Sequence[tuple[Stored, Tensor, Tensor]]) -> None:
        """Store new values, each with what it was made from and its step, where they are not there already."""
        for stored, values, step in updated:
            if isinstance(stored, Packed):  # [n] -> [whole blocks]: `_in_fp32` has made it that long
                whole = values.as_strided((_padded(stored),), (1,))
                stored.save(whole, self._memory("spare", len(whole))[: len(whole)], step=step)
            elif values is not stored:
                stored.copy_(values)

    def _memory(self, role: str, numel: int) -> Tensor:
        """Scratch of at least so many elements, fp32, which holds what this role left there."""
        scratch = self._scratch.get(role)
        if scratch is None or scratch.numel() < numel:
            scratch = self._scratch[role] = torch.empty(numel, device=self.device)
        return scratch


def _chunks(slices: Sequence[ParameterSlice], size: int) -> Iterator[list[ParameterSlice]]:
    """The slices in order, cut so that none of the lists has more than `size` elements."""
    chunk: list[ParameterSlice] = []
    left = size
    for part in slices:
        start, numel = 0, part.numel
        while start < numel:
            stop = min(start + left, numel)
            chunk.append(part.cut(start, stop))
            left -= -(-(stop - start) // BLOCK) * BLOCK
            start = stop
            if left <= 0:
                yield chunk
                chunk, left = [], size
    if chunk:
        yield chunk


def _cut(stored: Stored, part: slice) -> Stored:
    return stored[part] if isinstance(stored, Tensor) else stored.cut(part.start, part.stop)


def _is_cast(stored: Stored) -> bool:
    return isinstance(stored, Packed) or stored.dtype != torch.float32


def _numel(stored: Stored) -> int:
    return stored.numel() if isinstance(stored, Tensor) else stored.numel


def _padded(stored: Stored) -> int:
    return -(-_numel(stored) // BLOCK) * BLOCK
