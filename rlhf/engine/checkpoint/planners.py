"""Who writes and who reads which part of a tensor: the planners that PyTorch's distributed checkpoint asks.

What several ranks hold alike is written once, by the one with the least to write; on loading, each rank reads where its
part overlaps with what was written, whatever the number of ranks was. Data is looked up when it is needed, one tensor
at a time. Left out: files (`storage.py`).
"""

from __future__ import annotations

from collections import Counter
from io import BytesIO
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from rlhf.engine.checkpoint.stored_state import Part, Shape, Stored
from rlhf.runtime.dist import gather_objects


def chunk_of(part: Part) -> ChunkStorageMetadata:
    """A part as the distributed checkpoint calls it."""
    return ChunkStorageMetadata(offsets=torch.Size(part.offset), sizes=torch.Size(part.sizes))


class Saving(DefaultSavePlanner):
    """Plans what each rank writes of a `{key: Stored}`.

    To be used with `no_dist=True`: PyTorch would send the plans around as pickles. Here each rank sends what it holds,
    and all of them decide alike.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._rank = rank

    def create_local_plan(self) -> SavePlan:
        """Everything that this rank holds; what others hold too is taken away from all but one later."""
        self.plan = SavePlan([_write_item(**held) for held in self._held()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """This rank's part of the plan of all ranks; all must call."""
        held = gather_objects(self._held())
        plans, metadata = super().create_global_plan([SavePlan([_write_item(**one) for one in rank]) for rank in held])
        return [plans[self._rank]], metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor | BytesIO:
        """The rows to be written, from wherever they rest."""
        stored: Stored = self.state_dict[write_item.index.fqn]
        return stored.read()

    def _held(self) -> list[dict[str, Any]]:
        """Arguments of `_write_item`, as plain values, for everything that this rank holds."""
        return [
            {"key": stored.key, "shape": stored.shape, "part": tuple(stored.part), "dtype": _name(stored.dtype)}
            for stored in self.state_dict.values()
            if 0 not in stored.part.sizes
        ]


def _write_item(*, key: str, shape: Shape, part: tuple[Shape, Shape], dtype: str) -> WriteItem:
    chunk = chunk_of(Part(*part))
    properties = TensorProperties(dtype=getattr(torch, dtype))
    data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(shape))
    return WriteItem(index=MetadataIndex(key, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Loading(LoadPlanner):
    """Plans what each rank reads into a `{key: Stored}`, and hands over each tensor once all of it was read."""

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, *_: bool) -> None:
        """Take note of what is wanted and what there is."""
        assert metadata is not None, "the index is read before the planner is asked"
        self._wanted: dict[str, Stored] = state_dict
        self._metadata = metadata
        self._missing: Counter[str] = Counter()  # elements that have not arrived
        self._targets: dict[str, Tensor] = {}

    def create_local_plan(self) -> LoadPlan:
        """The overlaps of this rank's parts with those in the files, a tensor at a time."""
        items: list[ReadItem] = []
        for key, stored in sorted(self._wanted.items()):
            found = self._metadata.state_dict_metadata[key]
            assert isinstance(found, TensorStorageMetadata)
            overlaps = create_read_items_for_chunk_list(key, found, [chunk_of(stored.part)])
            items += [item for item in overlaps if 0 not in item.lengths]
            self._missing[key] = torch.Size(stored.part.sizes).numel()
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Each rank's plan is its own."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Never called: our checkpoints hold tensors, and JSON beside them."""
        raise AssertionError(f"{read_item.dest_index.fqn} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The piece of host memory that the overlap belongs into."""
        key = read_item.dest_index.fqn
        stored = self._wanted[key]
        if key not in self._targets:
            self._targets[key] = torch.empty(stored.part.sizes, dtype=stored.dtype)
        return _narrowed(self._targets[key], read_item.dest_offsets, sizes=read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """One overlap has arrived; the last of a tensor sets it and frees the memory."""
        key = read_item.dest_index.fqn
        self._missing[key] -= tensor.numel()
        if self._missing[key] == 0:
            self._wanted[key].write(self._targets.pop(key))

    def require_complete(self) -> None:
        """Raises ValueError where the files do not cover what is wanted."""
        incomplete = [key for key, count in self._missing.items() if count]
        if incomplete:
            raise ValueError(f"the files do not cover {', '.join(incomplete[:3])}")


def _narrowed(tensor: Tensor, offset: torch.Size, *, sizes: torch.Size) -> Tensor:
    for dim, (start, length) in enumerate(zip(offset, sizes, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
