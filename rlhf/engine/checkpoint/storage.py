"""Where PyTorch's distributed checkpoint puts tensors and finds them again: our files instead of its own, which pickle.

Left out: who writes and reads what (`planners.py`), and the bytes themselves (`files.py`).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from rlhf.engine.checkpoint.stored_state import Stored
from rlhf.engine.checkpoint.writer import Chunk, Writing, file_of, read_bytes


class Writer(StorageWriter):
    """Puts what a rank was told to write into its file: what is in memory from a copy, the rest before returning."""

    def __init__(self, writing: Writing, tensors: dict[str, Stored], *, rank: int, asynchronous: bool) -> None:
        self.parts: dict[str, dict[str, Any]] = {}
        """What this rank wrote of each tensor, and where; checksums are not known before everything is written."""
        self._rank = rank
        self._writing = writing
        self._stored = tensors
        self._asynchronous = asynchronous

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A Writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to change."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Nothing to change."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write, or copy for the thread, a tensor at a time."""
        for item in plan.items:
            stored = self._stored[item.index.fqn]
            start = self._writing.place(math.prod(stored.part.sizes) * stored.dtype.itemsize)
            rows = planner.resolve_data(item)
            assert isinstance(rows, Tensor)
            assert (rows.shape, rows.dtype) == (stored.part.sizes, stored.dtype), item.index.fqn
            later = self._asynchronous and stored.in_memory
            (self._writing.stage if later else self._writing.write)(start, rows)
            place = {"offset": list(stored.part.offset), "sizes": list(stored.part.sizes)}
            self.parts[item.index.fqn] = place | {"file": self._rank, "start": start}
        future: Future[list[WriteResult]] = Future()
        future.set_result([])  # `parts` says it: results would travel as pickles
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing to do: the table of contents is made by `contents`."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any folder will do."""
        return True


def contents(tensors: dict[str, Stored], parts: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Table of contents of `tensors`, given the `Writer.parts` of every rank."""
    return {
        key: {
            "dtype": str(stored.dtype).removeprefix("torch."),
            "shape": list(stored.shape),
            "parts": [written[key] for written in parts if key in written],
        }
        for key, stored in tensors.items()
    }


class Reader(StorageReader):
    """Reads the overlaps that a rank was told to read, and no more than the blocks they are in."""

    def __init__(self, folder: Path, tensors: dict[str, Any]) -> None:
        """Read what a `Writer` wrote to `folder`; `tensors` is its table of contents, with checksums."""
        self._folder = folder
        self._tensors = tensors

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A Reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents as the distributed checkpoint has it."""
        return Metadata({key: _metadata(entry) for key, entry in self._tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to change."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to change."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read in the order of the plan, which goes through the tensors one after the other.

        Raises:
            ValueError: a file is missing, too short or damaged.
        """
        for item in plan.items:
            target = planner.resolve_tensor(item)
            target.copy_(self._overlap(item))
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any folder will do."""
        return True

    def _overlap(self, item: ReadItem) -> Tensor:
        """The box `item.lengths` at `item.storage_offsets` of a part: whole rows are read, then cut."""
        entry = self._tensors[item.storage_index.fqn]
        offset = list(item.storage_index.offset or ())
        part = next(part for part in entry["parts"] if part["offset"] == offset)
        dtype: torch.dtype = getattr(torch, entry["dtype"])
        nbytes = math.prod(part["sizes"]) * dtype.itemsize
        chunk = Chunk(part["file"], part["start"], nbytes, part["checksums"])
        path = self._folder / file_of(chunk.file)
        if not part["sizes"]:
            return torch.frombuffer(read_bytes(path, chunk, begin=0, end=nbytes), dtype=dtype).reshape(())
        row = nbytes // part["sizes"][0]
        first, count = item.storage_offsets[0], item.lengths[0]
        data = read_bytes(path, chunk, begin=first * row, end=(first + count) * row)
        rows = torch.frombuffer(data, dtype=dtype).reshape(count, *part["sizes"][1:])
        for dim in range(1, rows.ndim):
            rows = rows.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
        return rows


def _metadata(entry: dict[str, Any]) -> TensorStorageMetadata:
    chunks = [
        ChunkStorageMetadata(offsets=torch.Size(part["offset"]), sizes=torch.Size(part["sizes"]))
        for part in entry["parts"]
    ]
    properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
    return TensorStorageMetadata(properties=properties, size=torch.Size(entry["shape"]), chunks=chunks)
