"""What of an engine goes into a checkpoint: tensors by name, of which each rank holds a part.

A `Stored` says how to get this rank's part and how to set it, and holds no data itself, so that a state on disk passes
through memory one tensor at a time. Left out: files (`storage.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from rlhf.engine.adamw import AdamW

Shape = tuple[int, ...]


class Part(NamedTuple):
    """A box inside a tensor."""

    offset: Shape
    sizes: Shape


@dataclass(frozen=True)
class Stored:
    """A tensor that a resumed run needs."""

    key: str
    """Its name in the checkpoint."""
    shape: Shape
    """Of the whole tensor."""
    part: Part
    """What this rank holds of it; the whole tensor where ranks hold the same."""
    dtype: torch.dtype
    """In the checkpoint, and of what `read` returns and `write` is given."""
    in_memory: bool
    """False for what rests on disk: it is never copied as a whole."""
    read: Callable[[], Tensor]
    """This rank's part, of `part.sizes`, on any device; it may share memory with what trains."""
    write: Callable[[Tensor], None]
    """Set this rank's part."""

    def below(self, prefix: str) -> Stored:
        """The same under the name `prefix/key`."""
        return replace(self, key=f"{prefix}/{self.key}")

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def part_of(parameter: Tensor) -> Part:
    """What this rank holds of `parameter` and of everything that is sharded as it is."""
    if not isinstance(parameter, DTensor):
        return Part((0,) * parameter.ndim, tuple(parameter.shape))
    (chunk,) = parameter.__create_chunk_list__()
    return Part(tuple(chunk.offsets), tuple(chunk.sizes))


def states_of(optimizer: AdamW) -> list[Stored]:
    """fp32 weights and moments of everything that learns, wherever they rest."""
    parameters = {name: parameter for group in optimizer.groups for name, parameter in group.items()}
    return [
        Stored(
            key=f"{name}/{part}",
            shape=tuple(parameters[name].shape),
            part=part_of(parameters[name]),
            dtype=torch.float32,
            in_memory=optimizer.in_memory(name),
            read=partial(optimizer.read_shard, name, part),
            write=partial(optimizer.write_shard, name, key=part),
        )
        for name, part in optimizer.entries()
    ]
