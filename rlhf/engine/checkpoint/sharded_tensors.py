"""The tensors of a checkpoint: which shard of each a rank holds, which rank writes it, and which parts a rank reads.

A `CheckpointTensor` can read and set this rank's shard and holds no data itself, so that a state on disk passes through
memory one tensor at a time. Shards are boxes inside the whole tensor: a rank that loads reads the overlaps of its own
box with those that were written, so the number of ranks and the ZeRO stage may change in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlhf.engine.dtensors import local_rows
from rlhf.runtime.dist import gather_objects

if TYPE_CHECKING:
    from rlhf.engine.adamw import AdamW

Shape = tuple[int, ...]


class Box(NamedTuple):
    """A box inside a tensor."""

    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        """Elements inside it; 1 for a scalar."""
        return torch.Size(self.sizes).numel()

    def overlap(self, other: Box) -> Box | None:
        """The elements that both boxes share; None where there are none."""
        starts = tuple(map(max, self.offsets, other.offsets))  # a box of no dimensions overlaps every other one
        stops = (min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True))
        sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        return Box(starts, sizes) if all(size > 0 for size in sizes) else None

    def view(self, shard: Tensor, part: Box) -> Tensor:
        """The elements of `part` in `shard`, which holds the elements of this box; shares memory."""
        for dim, start in enumerate(self.offsets):
            shard = shard.narrow(dim, part.offsets[dim] - start, part.sizes[dim])
        return shard


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor that a resumed run needs."""

    key: str
    """Its name in the checkpoint."""
    shape: Shape
    """Shape of the whole tensor."""
    box: Box
    """The shard that this rank holds; the whole tensor where all ranks hold the same."""
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
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def optimizer_tensors(optimizer: AdamW) -> list[CheckpointTensor]:
    """fp32 weights and moments of all trainable parameters, on whichever device or disk they are."""
    parameters = {name: parameter for group in optimizer.groups for name, parameter in group.items()}
    return [
        CheckpointTensor(
            key=f"{name}/{part}",
            shape=tuple(parameters[name].shape),
            box=_local_box(parameters[name]),
            dtype=torch.float32,
            in_memory=optimizer.in_memory(name),
            # Looked up when it is written: a state on disk is read then, one tensor at a time.
            read=partial(optimizer.read_shard, name, part),
            write=partial(optimizer.write_shard, name, key=part),
        )
        for name, part in optimizer.entries()
    ]


def keys_to_write(tensors: Mapping[str, CheckpointTensor], *, rank: int) -> list[str]:
    """The keys of the shards that this rank writes; all ranks must call.

    A shard that several ranks hold is written by one of them, the one with the least to write.
    """
    # Empty shards are not written: with more ranks than rows, the last ranks have none.
    mine = {key: tuple(tensor.box) for key, tensor in tensors.items() if tensor.box.numel}
    held = gather_objects(mine)  # a collective; from here on every rank computes the same
    holders: dict[tuple[str, tuple[Shape, ...]], list[int]] = defaultdict(list)
    for holder, boxes in enumerate(held):
        for key, box in boxes.items():
            holders[key, box].append(holder)
    elements = [0] * len(held)
    chosen = set()
    # Shards of a single rank come first, because they leave no choice.
    for (key, box), ranks in sorted(holders.items(), key=lambda item: len(item[1])):
        writer = min(ranks, key=elements.__getitem__)  # the lowest rank of several: the same on all ranks
        elements[writer] += Box(*box).numel
        if writer == rank:
            chosen.add(key)
    return [key for key in tensors if key in chosen]


def _local_box(parameter: Tensor) -> Box:
    """The shard that this rank holds of `parameter`, and of its master weights and moments."""
    rows = local_rows(parameter)  # FSDP2 shards dimension 0 only
    shape = tuple(parameter.shape)
    if not shape:
        return Box((), ())
    return Box((rows.start, *(0 for _ in shape[1:])), (rows.stop - rows.start, *shape[1:]))
