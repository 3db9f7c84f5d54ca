"""The gradients of a step: fp32 sums over micro-batches and ranks, one entry of local rows for each parameter.

Losses come divided by a global denominator, so nothing is averaged here, and the number of ranks, the accumulation and
the micro-batch size do not change a gradient.

With fp32 weights autograd and FSDP2 keep these sums in `.grad` themselves. With bf16 weights they would round each
micro-batch's gradient (and FSDP2 each reduced one) to bf16, so it is taken away from them before that and added here.

A parameter that no rank's loss reached has no gradient and is left alone, as in `torch.optim`. Replicas may reach
different ones; where parameters are sharded (stages 1 to 3), every rank must reach the same.
Left out: what is done with the sums (`optimizers.py`).
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.dist import World, sum_over_ranks
from rlhf.engine.sharding import ParameterGroup, Sharding, local


class GradientReport(NamedTuple):
    """What all ranks agree on before a step."""

    norm: float  # 2-norm over all parameters and ranks; not finite when any gradient is not
    reached: set[str]  # names of the parameters that have a gradient on some rank


class Gradients:
    """Collects what backward leaves behind until the step is taken."""

    def __init__(self, groups: list[ParameterGroup], sharding: Sharding, *, world: World, dtype: torch.dtype) -> None:
        self._parameters = {name: parameter for group in groups for name, parameter in group.items()}
        self._sums: dict[str, Tensor] = {}
        self._reduced: Tensor | None = None
        self._world = world
        self._copies = 1 if sharding.modules else world.size
        if dtype != torch.float32:
            self._collect_in_fp32(sharding)
        self._replicas = _ReplicaSum(groups, self) if self._copies > 1 else None

    def before_backward(self, *, last: bool) -> None:
        """Get ready for a micro-batch's backward; `last` is the step's last."""
        if self._replicas and last:
            self._replicas.begin()

    def after_backward(self, *, last: bool) -> None:
        """Finish what backward started; after the last the sums are complete."""
        self._reduced = None
        if self._replicas and last:
            self._replicas.finish()

    def report(self) -> GradientReport:
        """Norm and reach of the sums, the same on every rank, for one reduction and one wait for the device."""
        sums = self.sums()
        norm = torch.nn.utils.get_total_norm(sums.values()).to(self._world.device)
        squared = norm.double().square().reshape(1) / self._copies
        reached = squared.new_tensor([self._is_reached(name) for name in self._parameters])
        total, *counts = sum_over_ranks(torch.cat([squared, reached])).tolist()
        names = {name for name, count in zip(self._parameters, counts, strict=True) if count}
        return GradientReport(math.sqrt(total), names)

    def sums(self) -> dict[str, Tensor]:
        """This rank's rows of every sum there is, by name."""
        found = {name: self.sum_of(name) for name in self._parameters}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def sum_of(self, name: str) -> Tensor | None:
        """This rank's rows of one sum, None where backward has not reached the parameter."""
        gradient = self._parameters[name].grad
        return self._sums.get(name) if gradient is None else local(gradient)

    def clear(self) -> None:
        """Forget the step."""
        self._sums.clear()
        for parameter in self._parameters.values():
            parameter.grad = None

    def take(self, name: str) -> Tensor | None:
        """Remove a sum and return it."""
        gradient = self.sum_of(name)
        self._sums.pop(name, None)
        self._parameters[name].grad = None
        return gradient

    def put(self, name: str, gradient: Tensor) -> None:
        """Make `gradient` the sum of `name`."""
        self._sums[name] = gradient

    def _is_reached(self, name: str) -> bool:
        return name in self._replicas.reached if self._replicas else self.sum_of(name) is not None

    def _collect_in_fp32(self, sharding: Sharding) -> None:
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._collect, name))
        for module in sharding.modules:
            module.set_all_reduce_hook(self._remember)

    def _remember(self, reduced: Tensor) -> None:
        """Keep the fp32 sum over ranks of an FSDP2 group, flat, which FSDP2 is about to round and cut into gradients.

        FSDP2 made this hook for a second reduction. It runs between the first one and the rounding.
        """
        if reduced.is_cuda:  # made on one stream and read here on another
            reduced.record_stream(torch.cuda.current_stream(reduced.device))
        self._reduced = reduced

    def _collect(self, name: str, parameter: Tensor) -> None:
        """Take one micro-batch's gradient from `parameter` and add it to the sum."""
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        if self._reduced is not None:  # `gradient` is a window on the rounded copy: open the same one on the original
            gradient = self._reduced.as_strided(gradient.size(), gradient.stride(), gradient.storage_offset())
        parameter.grad = None
        if name in self._sums:
            self._sums[name] += gradient
        else:
            self._sums[name] = gradient.float()


class _ReplicaSum:
    """Sums the gradients of replicas (stage 0) over ranks, a group at a time, while backward goes on with the next.

    Groups leave in one order, that of backward, whichever parameters a rank's loss reaches: the ranks' reductions
    always match. A gradient that is missing here counts as zero, because another rank may have it.
    """

    def __init__(self, groups: list[ParameterGroup], gradients: Gradients) -> None:
        self._groups = groups[::-1]
        self._gradients = gradients
        self._awaited: list[int] = []
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self.reached: set[str] = set()
        for index, group in enumerate(self._groups):
            for parameter in group.values():
                parameter.register_post_accumulate_grad_hook(partial(self._arrive, index))

    def begin(self) -> None:
        self._awaited = [len(group) for group in self._groups]
        self.reached = set()

    def finish(self) -> None:
        while len(self._sent) < len(self._groups):
            self._send()
        for group, (work, flat) in zip(self._groups, self._sent, strict=True):
            work.wait()
            pieces = flat.split([parameter.numel() for parameter in group.values()])
            for (name, parameter), piece in zip(group.items(), pieces, strict=True):
                self._gradients.put(name, piece.view_as(parameter))
        self._awaited = []
        self._sent = []

    def _arrive(self, index: int, _: Tensor) -> None:
        if not self._awaited:  # not the last micro-batch
            return
        self._awaited[index] -= 1
        while len(self._sent) < len(self._groups) and self._awaited[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        pieces = []
        for name, parameter in self._groups[len(self._sent)].items():
            gradient = self._gradients.take(name)
            if gradient is None:
                gradient = torch.zeros_like(parameter, dtype=torch.float32)
            else:
                self.reached.add(name)
            pieces.append(gradient.flatten())
        flat = torch.cat(pieces)
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._sent.append((work, flat))
