"""Collects a step's gradients: sums over micro-batches and ranks, one flat shard for each parameter.

Losses are divided by a global denominator, so nothing is averaged here, and neither the number of ranks nor the
accumulation nor the micro-batch size changes a gradient.

Each gradient is taken from its parameter as soon as it is made and given to the store of the parameter's optimizer
state, which adds in fp32, or, where `engine.grad_accum_dtype` says so, in bf16. Autograd and FSDP2 would add bf16
gradients in bf16 (FSDP2 rounds each reduced one to bf16), and could add on the device only. Only ZeRO 1 leaves sums
over micro-batches to FSDP2, which adds them in `engine.reduce_dtype`, the type in which it reduces.

A single rank has nothing to reduce: gradients are taken from the gathered parameters as autograd makes them, before
FSDP2 copies those of a unit together, in fp32, twice.

Replicas (every parameter at stage 0, small ones at stage 3) are summed over ranks here, because FSDP2 does not.
A parameter that no rank's loss touched has no gradient and is not updated, as in `torch.optim`. Ranks may touch
different ones; those that one does not touch count as zero there, if its forward has gathered them.
See also: where sums are kept (`offload/grad_accumulation.py`), and what is done with them (`adamw.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from rlhf.engine.adamw import AdamW
from rlhf.engine.fsdp_units import FSDPUnit, ParameterGroup, local_shard
from rlhf.engine.offload.grad_accumulation import DeviceGradAccumulator
from rlhf.engine.sharding import Sharding
from rlhf.runtime.dist import World, sum_over_ranks
from rlhf.runtime.errors import RunError

_REDUCES_UNUSED = hasattr(FSDPModule, "set_reduce_scatter_unused_params")  # not in all versions of PyTorch


class GradientNorm(NamedTuple):
    """What all ranks agree on before a step."""

    norm: float  # 2-norm over all parameters and ranks; not finite when any gradient is not
    touched: set[str]  # names of the parameters that have a gradient on some rank


class Gradients:
    """Collects the gradients that backward makes, until the step is taken."""

    def __init__(self, groups: list[ParameterGroup], sharding: Sharding, *, world: World, optimizer: AdamW) -> None:
        """Put a hook on every parameter of `groups`; the stores of `optimizer` are given the gradients."""
        self._parameters = {name: parameter for group in groups for name, parameter in group.items()}
        self._optimizer = optimizer
        self._module = sharding.module
        self._world = world
        self._touched: set[str] = set()
        self._reduced: Tensor | None = None
        replicas = sharding.replicas
        # Every rank adds the squares of what it holds to the global norm, so they are divided by how many hold it.
        self._copies = {name: world.size if name in replicas else sharding.copies for name in self._parameters}
        early = not sharding.modules
        dtype = sharding.reduce_dtype
        self._replicas = _ReplicaSum(groups, replicas, dtype=dtype, keep=self._keep, early=early) if replicas else None
        for name, parameter in self._parameters.items():
            # FSDP2 runs the hook of a sharded one after its reduce-scatter, also where no rank has touched it.
            self._watch(name, parameter, notify=self._collect)
        for unit in sharding.units if sharding.modules else ():
            self._watch_gathered(unit, sharding.module)
        if world.size == 1:
            return
        for module in sharding.modules if _REDUCES_UNUSED else ():
            # Ranks may touch different parameters of a unit: their reduce-scatters must be of the same size.
            module.set_reduce_scatter_unused_params(True, recurse=False)
        # What FSDP2 casts is what is kept where all is fp32, where sums are in bf16, and where it reduced in that type.
        kept = {dtype, *(store.gradients.dtype for store in optimizer.stores)}
        narrow = any(parameter.dtype not in kept for parameter in self._parameters.values())
        for module in sharding.modules if narrow else ():
            module.set_all_reduce_hook(self._remember)

    def before_backward(self, *, last: bool) -> None:
        """Prepare for a micro-batch's backward; `last` is the step's last."""
        if self._replicas and last:
            self._replicas.begin()

    def after_backward(self, *, last: bool) -> None:
        """Finish what backward started; after the last micro-batch the sums are complete."""
        self._reduced = None  # the last group's; views of it that stores keep hold its memory
        if self._replicas and last:
            self._replicas.finish()

    def reduce_norm(self) -> GradientNorm:
        """The norm of the sums and the parameters they touch, the same on every rank.

        Costs one reduction and one wait for the device.

        Raises:
            RunError: a disk failed, on this rank or another.
        """
        stores, device = self._optimizer.stores, self._world.device
        squares = {name: square for store in stores for name, square in store.gradients.squared_norms().items()}
        total = _sum([squares[name] / self._copies[name] for name in self._parameters if name in squares], device)
        flags = [self._optimizer.failure is not None, *(name in self._touched for name in self._parameters)]
        # One collective for the norm, the disk failures and the touched parameters; [2 + parameters] fp64.
        totals = sum_over_ranks(torch.cat([total.reshape(1), total.new_tensor(flags)]))
        squared, failed, *counts = totals.tolist()  # here the host waits for the device
        self._optimizer.raise_failure(ranks=int(failed))
        names = {name for name, count in zip(self._parameters, counts, strict=True) if count}
        if not _REDUCES_UNUSED:
            self._require_same(counts)
        # Rounded to fp32, the last bits of the fp64 sum, which depend on the order, are gone: see [Note: norms].
        return GradientNorm(torch.tensor(squared, dtype=torch.float64).sqrt().float().item(), names)

    def _require_same(self, counts: list[float]) -> None:
        sharded = [count for count, p in zip(counts, self._parameters.values(), strict=True) if isinstance(p, DTensor)]
        partly = sum(0 < count < self._world.size for count in sharded)
        if partly:
            raise RunError(
                f"the loss has touched {partly} parameters on some ranks only, whose gradients PyTorch "
                f"{torch.__version__} cannot sum; expected 2.13, or ZeRO stage 0."
            )

    def torch_norm(self) -> float | None:
        """The norm rounded as `torch.nn.utils.get_total_norm` does; None unless one rank has all sums, in fp32."""
        sums = {name: total for store in self._optimizer.stores for name, total in store.gradients.in_memory().items()}
        whole = [sums[name] for name, _ in self._module.named_parameters() if name in sums]
        if self._world.size > 1 or {*sums} != self._touched or any(total.dtype != torch.float32 for total in whole):
            return None
        return get_total_norm(whole).item()  # a wait for the device

    def clear(self) -> None:
        """Drop the step's gradients, also in the middle of a step."""
        self._touched = set()
        if self._replicas:
            self._replicas.clear()
        for store in self._optimizer.stores:
            store.gradients.clear()

    def _watch(self, name: str, parameter: Tensor, *, notify: Callable[[str, Tensor], None]) -> None:
        """Call a method of this object with every gradient that `parameter` gets.

        PyTorch holds the hook where Python does not look for cycles: if it held this object, the parameters and all
        state of the optimizer would stay for the life of the process.
        """
        reference = weakref.WeakMethod(notify)

        def hook(parameter: Tensor) -> None:
            method = reference()
            assert method is not None, "backward of a model whose engine is gone"
            method(name, parameter)

        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def _watch_gathered(self, unit: FSDPUnit, root: nn.Module) -> None:
        """Watch a unit's gathered parameters, which FSDP2 makes when a forward first needs them.

        A single rank takes their gradients, before anything is reduced. On several ranks they tell which parameters the
        loss has touched: what FSDP2 has reduced is zero for others.
        """
        notify = self._collect if self._world.size == 1 else self._touch

        def add_hooks(*_: Any) -> None:
            # Wait for the first forward that a backward can follow.
            if not torch.is_grad_enabled():
                return
            for name, parameter in unit.group(root).items():
                if isinstance(self._parameters[name], DTensor):
                    self._watch(name, parameter, notify=notify)
            for handle in handles:
                handle.remove()  # FSDP2 keeps the gathered parameters from now on: their hooks stay

        handles = [module.register_forward_pre_hook(add_hooks) for module in unit.modules]

    def _remember(self, reduced: Tensor) -> None:
        """Keep the sum over ranks of an FSDP2 group, flat, which FSDP2 is about to cast and cut into gradients.

        FSDP2 offers this hook for a second reduction; it runs between the first reduction and the rounding.
        """
        if reduced.is_cuda:
            # Allocated on the reduce-scatter stream and read here on the current one: without this, its memory could
            # be reused by the other stream while our copy is still queued.
            reduced.record_stream(torch.cuda.current_stream(reduced.device))
        self._reduced = reduced

    def _touch(self, name: str, parameter: Tensor) -> None:  # noqa: ARG002 - as the other
        self._touched.add(name)

    def _collect(self, name: str, parameter: Tensor) -> None:
        """Take one micro-batch's gradient from `parameter`."""
        assert parameter.grad is not None
        gradient = local_shard(parameter.grad)
        parameter.grad = None  # else autograd adds the next micro-batch's to it, in the working type
        if self._world.size == 1 or not isinstance(parameter, DTensor):
            self._touch(name, parameter)
        if self._replicas and self._replicas.takes(name):
            self._replicas.add(name, gradient)
            return
        if self._reduced is not None and isinstance(parameter, DTensor):
            # `gradient` is a view of the copy in the weights' type; take the same view of the original.
            gradient = self._reduced.as_strided(gradient.size(), gradient.stride(), gradient.storage_offset())
        self._keep(name, gradient)

    def _keep(self, name: str, gradient: Tensor) -> None:
        self._optimizer.store_of(name).gradients.add(name, gradient.reshape(-1))  # [shard] -> flat


class _ReplicaSum:
    """Sums the gradients of replicas over ranks, a group at a time, while backward goes on with the next.

    Groups are sent in one order, that of backward, whichever parameters a rank's loss touches, so the ranks' reductions
    always match. A gradient that this rank does not have counts as zero, because another rank may have it.
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        names: Set[str],
        *,
        dtype: torch.dtype,
        keep: Callable[[str, Tensor], None],
        early: bool,
    ) -> None:
        """Sum the parameters called `names`, and pass each sum over micro-batches and ranks to `keep`.

        Micro-batches are added in fp32, ranks in `dtype`.
        `early` sends during backward. It must be off beside FSDP2's own reductions: where ours came among those would
        depend on which parameters a rank's loss touches.
        """
        self._early = early
        self._dtype = dtype
        mine = [{name: p for name, p in group.items() if name in names} for group in groups[::-1]]
        self._groups = [group for group in mine if group]
        self._group_of = {name: index for index, group in enumerate(self._groups) for name in group}
        self._keep = keep
        self._sums = DeviceGradAccumulator()
        self._missing: list[int] = []  # gradients that each group still waits for, while the last backward runs
        self._sent: list[tuple[dist.Work, Tensor]] = []  # holds the buffers, which the reductions write, until `wait`

    def takes(self, name: str) -> bool:
        """Whether a parameter is a replica."""
        return name in self._group_of

    def begin(self) -> None:
        """The step's last backward begins."""
        self._missing = [len(group) for group in self._groups]

    def add(self, name: str, gradient: Tensor) -> None:
        """Add a micro-batch's gradient; in the last micro-batch, send the groups that are complete with it."""
        self._sums.add(name, gradient.reshape(-1))
        if not (self._missing and self._early):
            return
        self._missing[self._group_of[name]] -= 1
        # Only in order: a group that is complete early waits for those before it, or ranks would send different ones.
        while len(self._sent) < len(self._groups) and self._missing[len(self._sent)] == 0:
            self._send()

    def finish(self) -> None:
        """After the last backward: send the remaining groups, and pass on all sums."""
        while len(self._sent) < len(self._groups):
            self._send()
        for group, (work, flat) in zip(self._groups, self._sent, strict=True):
            work.wait()  # gloo: the host waits; NCCL: the current stream does
            pieces = torch.split(flat, [parameter.numel() for parameter in group.values()])
            for name, piece in zip(group, pieces, strict=True):
                self._keep(name, piece)
        self._missing = []
        self._sent = []

    def clear(self) -> None:
        """Drop what was added and not sent yet."""
        self._sums.clear()

    def _send(self) -> None:
        """Start the all-reduce of the next group: one flat buffer, of the same size and type on every rank."""
        group, dtype = self._groups[len(self._sent)], self._dtype
        taken = self._sums.take(group)
        pieces = [
            taken[name].to(dtype) if name in taken else torch.zeros(p.numel(), dtype=dtype, device=p.device)
            for name, p in group.items()
        ]
        flat = torch.cat(pieces)
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self._sent.append((work, flat))


def _sum(scalars: list[Tensor], device: torch.device) -> Tensor:
    """The sum of fp64 scalars, some of them on the host and some on the device, with one copy from host to device."""
    on_device = [scalar for scalar in scalars if scalar.device == device]
    on_host = [scalar for scalar in scalars if scalar.device != device]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in (on_device, on_host):
        if part:
            total += torch.stack(part).sum().to(device)
    return total
