"""The state in a checkpoint: which rows of each tensor a rank holds and writes, and every generator of random numbers.

A `CheckpointTensor` can read and set this rank's shard and holds no data itself, so that a state on disk passes through
memory one tensor at a time. Shards are rows of the whole tensor: a rank that loads reads the rows that it needs,
whoever wrote them, so the number of ranks and the ZeRO stage may change in between.

Random states are plain JSON. Left out: generators made from a seed where they are used (sampling, shuffling, new
weights), which need no state.
"""

from __future__ import annotations

import base64
import random
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.config.engine_config import OffloadDevice
from rlhf.engine.adamw import AdamW
from rlhf.engine.ema import WeightAverage
from rlhf.engine.fsdp_units import local_rows
from rlhf.engine.sharding import Sharding
from rlhf.runtime.dist import gather_objects


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor that a resumed run needs."""

    key: str
    """Its name in the checkpoint."""
    shape: tuple[int, ...]
    """Shape of the whole tensor; a scalar counts as one row."""
    rows: range
    """The rows that this rank holds; all where every rank holds the whole tensor."""
    dtype: torch.dtype
    """In the checkpoint, and of the tensors that `read` returns and `write` takes."""
    in_memory: bool
    """False where `read` reads from a disk: such tensors are never all in memory at once."""
    read: Callable[[], Tensor]
    """Returns this rank's shard, on any device; it may share memory with what is being trained."""
    write: Callable[[Tensor], None]
    """Sets this rank's shard."""

    def under(self, prefix: str) -> CheckpointTensor:
        """The same tensor under the name `prefix/key`."""
        return replace(self, key=f"{prefix}/{self.key}")

    @property
    def shard_shape(self) -> torch.Size:
        """Shape of this rank's shard."""
        return torch.Size((len(self.rows), *self.shape[1:]) if self.shape else ())

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def optimizer_tensors(optimizer: AdamW, *, average: WeightAverage | None) -> list[CheckpointTensor]:
    """fp32 weights, moments and averages of all trainable parameters, on whichever device or disk they are."""
    parameters = {name: parameter for group in optimizer.groups for name, parameter in group.items()}

    def tensor(
        name: str, part: str, *, read: Callable[[], Tensor], write: Callable[[Tensor], None]
    ) -> CheckpointTensor:
        parameter = parameters[name]
        return CheckpointTensor(
            key=f"{name}/{part}",
            shape=tuple(parameter.shape),
            rows=local_rows(parameter),  # masters, moments and averages are sharded as their parameter is
            dtype=torch.float32,
            in_memory=optimizer.store_of(name).in_memory,
            read=read,
            write=write,
        )

    tensors = [
        # Looked up when it is written: a state on disk is read then, one tensor at a time.
        tensor(
            name,
            part,
            read=partial(optimizer.read_shard, name, part),
            write=partial(optimizer.write_shard, name, key=part),
        )
        for name, part in optimizer.entries()
    ]
    if average is not None:
        tensors += [
            tensor(name, "ema", read=partial(average.read, name), write=partial(average.write, name))
            for name in parameters
        ]
    return tensors


def working_tensors(sharding: Sharding) -> list[CheckpointTensor]:
    """The working weights of a frozen model, in their own type."""

    def write(name: str, shard: Tensor) -> None:
        sharding.write_shard(name, shard)
        sharding.flush()

    return [
        CheckpointTensor(
            key=f"{name}/weight",
            shape=tuple(parameter.shape),
            rows=local_rows(parameter),
            dtype=parameter.dtype,
            in_memory=sharding.offload_device != OffloadDevice.nvme,
            read=partial(sharding.read_shard, name),
            write=partial(write, name),
        )
        for name, parameter in sharding.module.named_parameters()
    ]


def keys_to_write(tensors: Mapping[str, CheckpointTensor], *, rank: int) -> list[str]:
    """The keys of the shards that this rank writes; all ranks must call.

    A shard that several ranks hold is written by one of them, the one with the least to write.
    """
    # Empty shards are not written: with more ranks than rows, the last ranks have none.
    mine = {key: (tensor.rows.start, tensor.rows.stop) for key, tensor in tensors.items() if tensor.rows}
    held = gather_objects(mine)  # a collective; from here on every rank computes the same
    holders: dict[tuple[str, tuple[int, int]], list[int]] = defaultdict(list)
    for holder, shards in enumerate(held):
        for key, rows in shards.items():
            holders[key, rows].append(holder)
    elements = [0] * len(held)
    chosen = set()
    # Shards of a single rank come first, because they leave no choice.
    for (key, (start, stop)), ranks in sorted(holders.items(), key=lambda item: len(item[1])):
        writer = min(ranks, key=elements.__getitem__)  # the lowest rank of several: the same on all ranks
        elements[writer] += (stop - start) * torch.Size(tensors[key].shape[1:]).numel()
        if writer == rank:
            chosen.add(key)
    return [key for key in tensors if key in chosen]


def seed_random_numbers(seed: int, *, rank: int) -> None:
    """Seed the random numbers of a stage, so that they do not depend on what the process did before.

    Only torch's are drawn from (dropout), on the device too.
    """
    torch.manual_seed(seed * 1_000_003 + rank)  # also CUDA's; another number for every pair of seed and rank


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, and on CUDA that of this rank's device."""
    twister = np.random.get_state(legacy=False)  # a dictionary, with an array inside
    assert isinstance(twister, dict)
    state: dict[str, Any] = {
        "python": random.getstate(),  # tuples, which JSON makes lists of
        "numpy": twister | {"state": {"key": twister["state"]["key"].tolist(), "pos": twister["state"]["pos"]}},
        "torch": _text(torch.get_rng_state()),
    }
    if device.type == "cuda":
        state["cuda"] = _text(torch.cuda.get_rng_state(device))  # a device sync
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Continue with the numbers after `random_state`; a state from a CPU does not change CUDA's generator."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    twister = state["numpy"]["state"]
    key = np.array(twister["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"] | {"state": {"key": key, "pos": twister["pos"]}})
    torch.set_rng_state(_tensor(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    # A bytearray, because torch warns about memory that it may not write to.
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
