"""Ranks, devices and reductions: the only user of `torch.distributed` outside `rlhf/engine/`.

One rank needs no process group, and every reduction is then the identity. Left out: sharding (see `rlhf/engine/`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rlhf.heap import return_freed_memory

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @classmethod
    def alone(cls) -> World:
        """One process that is no rank of anything, on the CPU."""
        return cls(rank=0, size=1, local_rank=0, device=torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and talks to people."""
        return self.rank == 0


def start(device: str = "auto") -> World:
    """Join the other ranks, if there are any; from here on freed memory goes back to the system (`heap.py`).

    Args:
        device: `auto` (CUDA when there is one), `cpu` or `cuda`.

    Raises:
        ValueError: see `check_devices`.
    """
    return_freed_memory()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    check_devices(device, ranks=int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)))
    on_cuda = device != "cpu" and torch.cuda.is_available()
    target = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(target)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(_backend(target), timeout=_TIMEOUT)
    return World(rank=rank, size=size, local_rank=local_rank, device=target)


def check_devices(device: str, *, ranks: int) -> None:
    """Make sure that each of `ranks` processes on this machine gets a device of its own, where they are to use CUDA.

    Raises:
        ValueError: `cuda` was asked for and there is none, or there are fewer devices than ranks.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and count == 0:
        raise ValueError("engine.device=cuda: this machine has no usable CUDA device; use engine.device=auto or cpu.")
    if device != "cpu" and 0 < count < ranks:
        raise ValueError(
            f"launch.ranks: found {ranks} ranks and {count} CUDA device(s) on this machine, expected a device for each "
            f"rank; start {count} (torchrun: --nproc-per-node={count}), or set engine.device=cpu."
        )


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def stop() -> None:
    """Leave the group, after everyone has arrived."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Elementwise sum of every rank's `x`, as a new tensor."""
    return _reduced(x, dist.ReduceOp.SUM)


def max_over_ranks(x: Tensor) -> Tensor:
    """Elementwise maximum of every rank's `x`, as a new tensor."""
    return _reduced(x, dist.ReduceOp.MAX)


def _reduced(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    total = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total, op=op)
    return total


def gather_objects(item: T) -> list[T]:
    """Every rank's `item`, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [item]
    gathered: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, item)
    return gathered  # type: ignore[return-value]


def broadcast_object(item: T) -> T:
    """Rank 0's `item`, on every rank."""
    if not dist.is_initialized():
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def device_mesh(world: World) -> DeviceMesh:
    """All ranks in one dimension called `ranks`; a process alone becomes a group of one."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(world.device), store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("ranks",))
