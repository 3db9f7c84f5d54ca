"""Ranks, devices, reductions and messages: the only user of `torch.distributed` outside `rlhf/engine/`.

A single rank needs no process group, and every reduction is then the identity. Messages are never pickled, so a
received one cannot name code. See also: how ranks are started (`launch.py`) and watched (`heartbeat.py`).
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from rlhf.config.run_config import LaunchConfig
from rlhf.runtime.errors import RunError
from rlhf.runtime.heartbeat import HEARTBEAT, Heartbeat, RankMonitor
from rlhf.runtime.network import choose_device
from rlhf.runtime.process import LAUNCHER, return_freed_memory

T = TypeVar("T")

_LOOPBACK = "127.0.0.1"
_SLACK = timedelta(minutes=1)  # so that the heartbeats name a missing rank before a collective fails without a name
_meshes: dict[int, DeviceMesh] = {}  # those of two dimensions, by `shard_ranks`


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def alone(cls) -> World:
        """A single process without a group, on the CPU."""
        return cls(rank=0, size=1, device=torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and reports to the user."""
        return self.rank == 0


def start(device: str = "auto", *, launch: LaunchConfig | None = None) -> World:
    """Join the other ranks, if there are any, and return freed memory to the system from now on.

    Args:
        device: `auto` (CUDA when there is one), `cpu` or `cuda`.
        launch: how long ranks wait for each other.

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
        torch.cuda.set_device(target)  # before anything is allocated, or every rank opens a context on the first GPU
    if size > 1 and not dist.is_initialized():
        _join(target, launch or LaunchConfig())
    return World(rank=rank, size=size, device=target)


def check_devices(device: str, *, ranks: int) -> None:
    """Check that each of the `ranks` processes on this machine gets a device of its own, if they use CUDA.

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


def _join(device: torch.device, launch: LaunchConfig) -> None:
    """Form the group, with a heartbeat from the first moment on."""
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        _stay_on_this_machine()
    else:
        choose_device(os.environ["MASTER_ADDR"])
    timeout = timedelta(seconds=launch.timeout_s)
    store, rank, size = _meet(timeout)
    watched = LAUNCHER in os.environ  # by our own launcher; torchrun does not look for missing ranks
    # Clones, because a connection on which one thread waits serves no other.
    monitor = None if watched else RankMonitor(store.clone(), range(size), launch=launch)
    HEARTBEAT[:] = [Heartbeat(store.clone(), rank, progress=_collectives, launch=launch, monitor=monitor)]
    dist.init_process_group(_backend(device), store=store, rank=rank, world_size=size, timeout=timeout + _SLACK)


def _meet(timeout: timedelta) -> tuple[Any, int, int]:
    """The store of the ranks, this one's number, and how many there are."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        met: tuple[Any, int, int] = next(rendezvous("env://", timeout=timeout + _SLACK))
        return met
    except dist.DistNetworkError as error:
        taken = "EADDRINUSE" in str(error)
        raise RunError(
            f"the ranks cannot meet at {place} (MASTER_ADDR, MASTER_PORT): "
            + ("another program has this port; choose another." if taken else str(error).partition("\n")[0])
        ) from error


def _stay_on_this_machine() -> None:
    """Make gloo and NCCL listen on the loopback device, which no other machine can reach."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


def host_store() -> tuple[Any, dict[str, str]]:
    """A store for the ranks of this machine only, and the environment variables by which they find it.

    It lives as long as the returned object. Without a socket of ours, torch would listen on every network device,
    whatever the host name.
    """
    listener = socket.create_server((_LOOPBACK, 0))
    port = listener.getsockname()[1]  # chosen by the system, and never free for another process in between
    store = dist.TCPStore(  # type: ignore[attr-defined]
        _LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    place = {"MASTER_ADDR": _LOOPBACK, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store, place


def _collectives() -> int:
    """How many collectives this rank has begun; -1 before it has joined."""
    if not dist.is_initialized():
        return -1
    # Device meshes may have groups of their own besides the default one. Every rank is in one group of each kind and
    # makes the same calls, so their sequence numbers can be added.
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    backends = {id(found): found for group in groups for found in map(group._get_backend, group._device_types)}
    return sum(backend._get_sequence_number_for_group() for backend in backends.values())


def stop() -> None:
    """Leave the group, once all ranks have come here."""
    if dist.is_initialized():
        barrier()  # a rank that left early would take the store with it, or seem missing
        while HEARTBEAT:
            HEARTBEAT.pop().stop()
        _meshes.clear()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def device_mesh(world: World, *, shard_ranks: int = 0) -> DeviceMesh:
    """All ranks in one dimension called `ranks`; a single process becomes a group of one.

    With `shard_ranks`, in two: `copies`, and `ranks`, that many consecutive ones, which hold one copy together.
    """
    if not dist.is_initialized():
        dist.init_process_group(_backend(world.device), store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    if not shard_ranks or shard_ranks == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("ranks",))
    if shard_ranks not in _meshes:  # each has communicators of its own, which the engines of a run share
        shape, names = (world.size // shard_ranks, shard_ranks), ("copies", "ranks")
        _meshes[shard_ranks] = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    return _meshes[shard_ranks]


def sum_over_ranks(x: Tensor) -> Tensor:
    """Elementwise sum of every rank's `x`, as a new tensor."""
    return _reduced(x, dist.ReduceOp.SUM)


def max_over_ranks(x: Tensor) -> Tensor:
    """Elementwise maximum of every rank's `x`, as a new tensor."""
    return _reduced(x, dist.ReduceOp.MAX)


def _reduced(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    total = x.detach().clone()  # all_reduce works in place
    if dist.is_initialized():
        dist.all_reduce(total, op=op)  # every rank must come here
    return total


def copy_from_first(x: Tensor) -> None:
    """Overwrite `x` with the first rank's."""
    if dist.is_initialized():
        dist.broadcast(x, src=0)  # every rank must come here


def gather_rows(rows: Tensor) -> Tensor:
    """Every rank's `rows` `[b, ...]`, equally many, one rank after the other: `[ranks x b, ...]`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    everything = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(everything, rows.contiguous())
    return everything


def exchange_rows(rows: Tensor, sent: Sequence[int], *, received: Sequence[int]) -> Tensor:
    """Send the first `sent[0]` of `rows` to rank 0, the next to rank 1, and so on; returns what came from each.

    Args:
        rows: `[N, ...]`, in the order of their receivers.
        sent: rows for each rank, this one included.
        received: rows from each rank, as every rank knows without asking.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), list(received), list(sent))
    return arrived


# ---- messages


def gather_objects(item: T) -> list[T]:
    """Every rank's `item`, in the order of ranks, on every rank: plain values and CPU tensors, no classes."""
    if not dist.is_initialized():
        return [item]
    mine = torch.frombuffer(bytearray(to_bytes(item)), dtype=torch.uint8)  # [bytes], on the CPU: gathered by gloo
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(mine)]))  # the first of two collectives
    longest = max(int(length) for length in lengths)
    # all_gather wants tensors of one size: shorter messages are padded, and cut again below.
    messages = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(messages, torch.cat([mine, mine.new_zeros(longest - len(mine))]))
    return [
        from_bytes(message[: int(length)].numpy().tobytes()) for message, length in zip(messages, lengths, strict=True)
    ]


def broadcast_object(item: T) -> T:
    """Rank 0's `item`, on every rank: plain values and CPU tensors, no classes."""
    is_sender = not dist.is_initialized() or dist.get_rank() == 0
    # What is sent is small, so a gather, in which the others send None, does as well as a broadcast.
    sent: list[Any] = gather_objects(item if is_sender else None)
    received: T = sent[0]
    return received


@dataclass
class Outcome:
    """Whether a step that all ranks took together succeeded."""

    error: str = ""
    """What failed, on whichever rank; empty if nothing did."""
    cause: Exception | None = None
    """On the rank that failed."""


@contextmanager
def agreed() -> Iterator[Outcome]:
    """Catch what fails inside, on whichever rank; afterwards `error` says it on all of them."""
    outcome = Outcome()
    try:
        yield outcome
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a RunError, or one of CUDA's
        outcome.error, outcome.cause = str(error) or type(error).__name__, error
    # A collective, which every rank reaches: one that raised before it would leave the others waiting.
    outcome.error = next(filter(None, gather_objects(outcome.error)), "")


def to_bytes(value: Any) -> bytes:
    """`value` as a safetensors file in memory: its tensors, and as one more tensor the JSON of everything else.

    It holds None, bool, int, float, str, CPU tensors, and lists, tuples and dictionaries of them, which come back bit
    for bit. Left out: objects of classes; send their fields.

    Raises:
        TypeError: it holds anything else.
    """
    tensors: list[Tensor] = []
    text = json.dumps(_packed(value, tensors)).encode()
    # Clones, because safetensors refuses tensors that share memory.
    named = {
        str(number): tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for number, tensor in enumerate(tensors)
    }
    return save({"json": torch.frombuffer(bytearray(text), dtype=torch.uint8), **named})


def from_bytes(data: bytes) -> Any:
    """The value that `to_bytes` was given."""
    tensors = load(data)
    return _unpacked(json.loads(tensors["json"].numpy().tobytes()), tensors)


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """`value` as JSON; what JSON lacks becomes a dictionary of one key, and tensors are appended to `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": str(len(tensors) - 1)}
    if type(value) is list:
        return [_packed(item, tensors) for item in value]
    if type(value) is tuple:
        return {"tuple": [_packed(item, tensors) for item in value]}
    if type(value) is dict:
        return {"dict": [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]}
    raise TypeError(f"a {type(value).__name__} cannot be sent to other ranks: send plain values and tensors")


def _unpacked(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_packed`."""
    if isinstance(packed, list):
        return [_unpacked(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpacked(item, tensors) for item in content)
    return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in content}
