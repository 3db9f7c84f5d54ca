"""Ranks, devices and reductions: the only user of `torch.distributed` outside `rlhf/engine/`.

One rank needs no process group, and every reduction is then the identity. Left out: sharding (see `rlhf/engine/`).
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from rlhf.config.run_config import LaunchConfig
from rlhf.runtime.heartbeat import Heartbeat, RankMonitor
from rlhf.runtime.malloc import return_freed_memory
from rlhf.runtime.parent import LAUNCHER
from rlhf.runtime.serialization import from_bytes, to_bytes

T = TypeVar("T")

_LOOPBACK = "127.0.0.1"
_SLACK = timedelta(minutes=1)  # a missing rank is named before a collective fails without a name
_heartbeat: list[Heartbeat] = []  # of this process, while it is one of several ranks


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


def start(device: str = "auto", *, launch: LaunchConfig | None = None) -> World:
    """Join the other ranks, if there are any; from here on freed memory goes back to the system (`malloc.py`).

    Args:
        device: `auto` (CUDA when there is one), `cpu` or `cuda`.
        launch: how long the others wait for a rank.

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
        _join(target, launch or LaunchConfig())
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


def _join(device: torch.device, launch: LaunchConfig) -> None:
    """Meet the other ranks, with a heartbeat from the first moment on."""
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        _stay_on_this_machine()
    timeout = timedelta(seconds=launch.timeout_s)
    store, rank, size = next(rendezvous("env://", timeout=timeout + _SLACK))
    watched = LAUNCHER in os.environ
    monitor = None if watched else RankMonitor(store.clone(), range(size), launch=launch)
    _heartbeat[:] = [Heartbeat(store.clone(), rank, progress=_collectives, launch=launch, monitor=monitor)]
    dist.init_process_group(_backend(device), store=store, rank=rank, world_size=size, timeout=timeout + _SLACK)


def _stay_on_this_machine() -> None:
    """Have gloo and NCCL listen on the loopback device, which no other machine reaches."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


def host_store() -> tuple[Any, dict[str, str]]:
    """A meeting place for ranks of this machine alone, and the environment in which they find it.

    It lives as long as the object. torch would listen on every network device, whatever the host name, unless it is
    given a socket.
    """
    listener = socket.create_server((_LOOPBACK, 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        _LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    place = {"MASTER_ADDR": _LOOPBACK, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store, place


def _collectives() -> int:
    """How many collectives this rank has begun; -1 while it joins."""
    if not dist.is_initialized():
        return -1
    # A device mesh may have a group of its own beside the default one, and all of ours have every rank.
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    backends = {id(found): found for group in groups for found in map(group._get_backend, group._device_types)}
    return sum(backend._get_sequence_number_for_group() for backend in backends.values())


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def stop() -> None:
    """Leave the group, after everyone has arrived."""
    if dist.is_initialized():
        barrier()
        while _heartbeat:
            _heartbeat.pop().stop()
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
    """Every rank's `item`, in the order of the ranks, on every rank: plain values and CPU tensors, no classes."""
    if not dist.is_initialized():
        return [item]
    mine = _message(item)
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(mine)]))
    longest = max(int(length) for length in lengths)
    messages = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(messages, torch.cat([mine, mine.new_zeros(longest - len(mine))]))
    return [_item(message[: int(length)]) for message, length in zip(messages, lengths, strict=True)]


def broadcast_object(item: T) -> T:
    """Rank 0's `item`, on every rank: plain values and CPU tensors, no classes."""
    if not dist.is_initialized():
        return item
    is_sender = dist.get_rank() == 0
    message = _message(item) if is_sender else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(message)])
    dist.broadcast(length, src=0)
    message = message if is_sender else message.new_empty(int(length))
    dist.broadcast(message, src=0)
    received: T = _item(message)
    return received


def _message(item: Any) -> Tensor:
    return torch.frombuffer(bytearray(to_bytes(item)), dtype=torch.uint8)


def _item(message: Tensor) -> Any:
    return from_bytes(message.numpy().data)


def device_mesh(world: World) -> DeviceMesh:
    """All ranks in one dimension called `ranks`; a process alone becomes a group of one."""
    if not dist.is_initialized():
        dist.init_process_group(_backend(world.device), store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("ranks",))
