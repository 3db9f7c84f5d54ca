"""The gradients of a step: sums over micro-batches and ranks, one entry of local rows for each parameter.

Losses come divided by a global denominator, so nothing is averaged here, and the number of ranks, the accumulation and
the micro-batch size do not change a gradient.

Every gradient is taken away from its parameter as it is made and given to the home of the parameter's optimizer state,
which adds in fp32: autograd and FSDP2 would add bf16 gradients in bf16 (FSDP2 rounds each reduced one to bf16), and
could add nowhere but on the device.

A rank by itself has nothing to reduce: gradients are taken from the gathered parameters as autograd makes them, before
FSDP2 copies those of a unit together, in fp32, twice.

Replicas (every parameter at stage 0, small ones at stage 3) are summed over ranks here, where FSDP2 does not.
A parameter that no rank's loss reached has no gradient and is left alone, as in `torch.optim`. Replicas may reach
different ones; where parameters are sharded (stages 1 to 3), every rank must reach the same.
Left out: where sums rest (`tiers/stores.py`) and what is done with them (`adamw.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Set
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.engine.adamw import AdamW, raise_failure
from rlhf.engine.fsdp_units import Unit
from rlhf.engine.offload.grad_accumulation import DeviceGradAccumulator
from rlhf.engine.sharding import ParameterGroup, Sharding, local
from rlhf.runtime.dist import World, sum_over_ranks


class GradientReport(NamedTuple):
    """What all ranks agree on before a step."""

    norm: float  # 2-norm over all parameters and ranks; not finite when any gradient is not
    reached: set[str]  # names of the parameters that have a gradient on some rank


class Gradients:
    """Collects what backward leaves behind until the step is taken."""

    def __init__(
        self,
        groups: list[ParameterGroup],
        sharding: Sharding,
        *,
        world: World,
        optimizer: AdamW,
        replicas: Set[str],
    ) -> None:
        """Watch the parameters from now on.

        Args:
            groups: the parameters that learn.
            sharding: of the model.
            world: this rank among the others.
            optimizer: where each gradient goes.
            replicas: parameters that every one of several ranks holds whole.
        """
        self._parameters = {name: parameter for group in groups for name, parameter in group.items()}
        self._optimizer = optimizer
        self._world = world
        self._reached: set[str] = set()
        self._reduced: Tensor | None = None
        self._copies = {name: world.size if name in replicas else 1 for name in self._parameters}
        early = not sharding.modules
        self._replicas = _ReplicaSum(groups, replicas, keep=self._keep, early=early) if replicas else None
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._collect, name))
        if world.size == 1:
            for unit in sharding.units if sharding.modules else ():
                self._collect_unreduced(unit, sharding.module)
            return
        narrow = any(parameter.dtype != torch.float32 for parameter in self._parameters.values())
        for module in sharding.modules if narrow else ():
            module.set_all_reduce_hook(self._remember)

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
        """Norm and reach of the sums, the same on every rank, for one reduction and one wait for the device.

        Raises:
            RunError: a disk failed, on this rank or another.
        """
        stores, device = self._optimizer.stores, self._world.device
        squares = {name: square for home in stores for name, square in home.squares().items()}
        failures = [home.failure for home in stores if home.failure is not None]
        total = _sum([squares[name] / self._copies[name] for name in self._parameters if name in squares], device)
        flags = [bool(failures), *(name in self._reached for name in self._parameters)]
        squared, failed, *counts = sum_over_ranks(torch.cat([total.reshape(1), total.new_tensor(flags)])).tolist()
        raise_failure(failures[0] if failures else None, ranks=int(failed))
        names = {name for name, count in zip(self._parameters, counts, strict=True) if count}
        # Rounded to fp32, the last bits of the fp64 sum, which depend on the order, are gone: see `norms.py`.
        return GradientReport(torch.tensor(squared, dtype=torch.float64).sqrt().float().item(), names)

    def clear(self) -> None:
        """Forget the step."""
        self._reached = set()
        for home in self._optimizer.stores:
            home.clear()

    def elements(self) -> int:
        """How many numbers of gradients this rank keeps on the device."""
        local_sums = self._replicas.elements() if self._replicas else 0
        return local_sums + sum(home.elements() for home in self._optimizer.stores)

    def _collect_unreduced(self, unit: Unit, root: nn.Module) -> None:
        """Take the gradients of a unit's gathered parameters, which FSDP2 makes when a forward first needs them."""

        def watch(*_: Any) -> None:
            if not torch.is_grad_enabled():
                return
            for name, parameter in unit.group(root).items():
                if isinstance(self._parameters[name], DTensor):
                    parameter.register_post_accumulate_grad_hook(partial(self._collect, name))
            for handle in handles:
                handle.remove()

        handles = [module.register_forward_pre_hook(watch) for module in unit.modules]

    def _remember(self, reduced: Tensor) -> None:
        """Keep the fp32 sum over ranks of an FSDP2 group, flat, which FSDP2 is about to round and cut into gradients.

        FSDP2 made this hook for a second reduction. It runs between the first one and the rounding.
        """
        if reduced.is_cuda:  # made on one stream and read here on another
            reduced.record_stream(torch.cuda.current_stream(reduced.device))
        self._reduced = reduced

    def _collect(self, name: str, parameter: Tensor) -> None:
        """Take one micro-batch's gradient from `parameter`."""
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        parameter.grad = None
        self._reached.add(name)
        if self._replicas and self._replicas.takes(name):
            self._replicas.add(name, gradient)
            return
        if self._reduced is not None and isinstance(parameter, DTensor):
            # `gradient` is a window on the rounded copy: open the same one on the original.
            gradient = self._reduced.as_strided(gradient.size(), gradient.stride(), gradient.storage_offset())
        self._keep(name, gradient)

    def _keep(self, name: str, gradient: Tensor) -> None:
        self._optimizer.store_of(name).add(name, gradient.reshape(-1))


class _ReplicaSum:
    """Sums the gradients of replicas over ranks, a group at a time, while backward goes on with the next.

    Groups leave in one order, that of backward, whichever parameters a rank's loss reaches: the ranks' reductions
    always match. A gradient that is missing here counts as zero, because another rank may have it.
    """

    def __init__(
        self, groups: list[ParameterGroup], names: Set[str], *, keep: Callable[[str, Tensor], None], early: bool
    ) -> None:
        """Sum the parameters called `names`, and give each sum over micro-batches and ranks to `keep`.

        With `early`, during backward; not beside FSDP2's own reductions, among which their place would depend on which
        parameters a rank's loss reaches.
        """
        self._early = early
        mine = [{name: p for name, p in group.items() if name in names} for group in groups[::-1]]
        self._groups = [group for group in mine if group]
        self._group_of = {name: index for index, group in enumerate(self._groups) for name in group}
        self._keep = keep
        self._sums = DeviceGradAccumulator()
        self._awaited: list[int] = []
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def takes(self, name: str) -> bool:
        """Whether a parameter is a replica."""
        return name in self._group_of

    def elements(self) -> int:
        return self._sums.elements()

    def begin(self) -> None:
        self._awaited = [len(group) for group in self._groups]

    def add(self, name: str, gradient: Tensor) -> None:
        """Add a micro-batch's gradient, and send what is complete with it."""
        self._sums.add(name, gradient.reshape(-1))
        if not self._awaited:  # not the last micro-batch
            return
        if not self._early:
            return
        self._awaited[self._group_of[name]] -= 1
        while len(self._sent) < len(self._groups) and self._awaited[len(self._sent)] == 0:
            self._send()

    def finish(self) -> None:
        while len(self._sent) < len(self._groups):
            self._send()
        for group, (work, flat) in zip(self._groups, self._sent, strict=True):
            work.wait()
            pieces = flat.split([parameter.numel() for parameter in group.values()])
            for name, piece in zip(group, pieces, strict=True):
                self._keep(name, piece)
        self._awaited = []
        self._sent = []

    def _send(self) -> None:
        group = self._groups[len(self._sent)]
        taken = self._sums.take(group)
        pieces = [
            taken[name].float() if name in taken else torch.zeros(p.numel(), device=p.device)
            for name, p in group.items()
        ]
        flat = torch.cat(pieces)
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._sent.append((work, flat))


def _sum(scalars: list[Tensor], device: torch.device) -> Tensor:
    """Of fp64 scalars on the host and on the device, in one copy."""
    there = [scalar for scalar in scalars if scalar.device == device]
    here = [scalar for scalar in scalars if scalar.device != device]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in (there, here):
        if part:
            total += torch.stack(part).sum().to(device)
    return total
