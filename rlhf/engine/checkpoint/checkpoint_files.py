"""The files of a checkpoint: one safetensors file of each rank, and `checkpoint.json`, which says what is where.

Any reader of safetensors opens a rank's file; a tensor in it is that rank's shard. `checkpoint.json` holds the rows of
each shard in the whole tensor, all state that is not a tensor, and checksums. Every block of a shard has its own, so
that some rows can be read and trusted without reading the rest. Nothing is pickled.
See also: when a checkpoint counts as complete (`checkpoints.py`).
"""

from __future__ import annotations

import json
import os
import zlib
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypedDict

import torch
from torch import Tensor

from rlhf.engine.checkpoint.checkpoint_state import CheckpointTensor
from rlhf.models.export import Entry, SafetensorsFile

BLOCK = 4 << 20
"""Bytes that share a checksum."""
INDEX = "checkpoint.json"
_FORMAT = 3


class ShardEntry(TypedDict):
    """One shard in `checkpoint.json`."""

    rank: int  # that wrote it
    rows: list[int]  # of the whole tensor: the first, and the one after the last
    start: int  # of its bytes in the rank's file
    checksums: list[int]  # crc32 of each block


class TensorEntry(TypedDict):
    """One tensor in `checkpoint.json`."""

    dtype: str
    shape: list[int]
    shards: list[ShardEntry]


def file_of(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


class ShardWriter:
    """Writes one rank's file: some tensors at once, others from a copy, in a thread.

    A disk's failure is kept in `error` and never raised here: all ranks decide together whether a checkpoint counts.
    """

    def __init__(self, folder: Path, tensors: Iterable[CheckpointTensor], *, rank: int) -> None:
        """Create the file of `rank`; every one of `tensors` must then be given to `write` or `stage`."""
        self.entries: dict[str, ShardEntry] = {}
        """What was written; complete after `wait`."""
        self.error = ""
        self._rank, self._path = rank, folder / file_of(rank)
        self._staged: deque[tuple[CheckpointTensor, Tensor]] = deque()  # left to the thread once `begin` was called
        self._thread: Thread | None = None
        self._cancelled = Event()
        self._file: SafetensorsFile | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The header comes first in the file; names, shapes and types suffice for it, so no tensor is read yet.
            header = [Entry(tensor.key, tensor.shard_shape, tensor.dtype) for tensor in tensors]
            self._file = SafetensorsFile(self._path, header)
        except OSError as error:
            self._fail(error)

    def write(self, tensor: CheckpointTensor, shard: Tensor) -> None:
        """Write a shard before returning."""
        if self._file is None or self.error or self._cancelled.is_set():
            return
        shard = shard.detach().cpu().contiguous()  # from a device: the host waits for it
        data: memoryview = shard.reshape(-1).view(torch.uint8).numpy().data
        self.entries[tensor.key] = {
            "rank": self._rank,
            "rows": [tensor.rows.start, tensor.rows.stop],
            "start": self._file.offset_of(tensor.key),
            # Of the bytes in memory, so that a disk that stores others is found out.
            "checksums": [zlib.crc32(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)],
        }
        try:
            self._file.write(tensor.key, shard)
        except OSError as error:
            self._fail(error)

    def stage(self, tensor: CheckpointTensor, shard: Tensor) -> None:
        """Copy a shard to host memory before returning; the thread writes the copy."""
        # A blocking copy: once it returns, training may change the original.
        self._staged.append((tensor, shard.detach().to("cpu", copy=True)))

    def begin(self) -> None:
        """Have a thread write what was staged and sync the file to the disk."""
        # Only files are touched in the thread: a collective there could meet one of the main thread's.
        self._thread = Thread(target=self._finish, name="checkpoint")
        # Lifetime: no daemon. Python joins it at exit; one that was cut off inside torch would abort the process.
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether the thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until everything is on the disk, or `error` says why it is not."""
        if self._thread is not None:
            self._thread.join()  # what it wrote to `entries` and `error` may be read from here on
        if self._file is not None and self._file.missing and not self.error:  # cancelled, or the thread has crashed
            self.error = f"{self._path}: {len(self._file.missing)} tensors were not written"

    def cancel(self) -> None:
        """Do not write what is not written yet."""
        self._cancelled.set()
        self.wait()

    def _finish(self) -> None:
        """Runs in the thread."""
        while self._staged:
            self.write(*self._staged.popleft())  # popped, so that its memory is freed once it is written
        if self._file is not None:
            try:
                self._file.sync()
                self._file.close()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.error = self.error or f"{self._path}: {error.strerror}"


def read_shard(tensor: CheckpointTensor, entry: TensorEntry, *, folder: Path) -> Tensor:
    """This rank's shard of `tensor`, put together in host memory from the shards that were saved.

    Raises:
        ValueError: a file is missing or damaged, or the saved shards do not cover this one.
    """
    result, missing = torch.empty(tensor.shard_shape, dtype=tensor.dtype), len(tensor.rows)
    by_row = result.view(len(tensor.rows), -1)  # [rows, elements of a row]; a scalar becomes [1, 1]
    row_bytes = by_row.shape[1] * tensor.dtype.itemsize
    for saved in entry["shards"]:
        first, stop = saved["rows"]
        shared = range(max(first, tensor.rows.start), min(stop, tensor.rows.stop))  # empty where they do not overlap
        if shared:
            begin, end = ((row - first) * row_bytes for row in (shared.start, shared.stop))
            data = _read_bytes(folder, saved, begin=begin, end=end, nbytes=(stop - first) * row_bytes)
            into = by_row[shared.start - tensor.rows.start :][: len(shared)]
            into.copy_(torch.frombuffer(data, dtype=tensor.dtype).view(into.shape))
            missing -= len(shared)
    if missing:
        raise ValueError(f"the files do not cover {tensor.key}")
    return result


def _read_bytes(folder: Path, entry: ShardEntry, *, begin: int, end: int, nbytes: int) -> memoryview:
    """Bytes `begin` to `end` of a shard of `nbytes`; all blocks that they are in are compared with their checksums."""
    path = folder / file_of(entry["rank"])
    start, stop = begin // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, nbytes)  # only whole blocks have checksums
    data = memoryview(bytearray(stop - start))
    try:
        with path.open("rb") as file:
            file.seek(entry["start"] + start)
            count = file.readinto(data)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    first = entry["start"] + start  # in the file
    if count < len(data):
        raise ValueError(f"{path} ends at byte {first + count}; expected at least {first + len(data)}")
    for at in range(0, len(data), BLOCK):
        block = data[at : at + BLOCK]
        if zlib.crc32(block) != entry["checksums"][(start + at) // BLOCK]:
            raise ValueError(
                f"{path} is damaged: bytes {first + at} to {first + at + len(block)} are not what was written"
            )
    return data[begin - start : end - start]


def require_files(folder: Path, tensors: dict[str, TensorEntry]) -> None:
    """Check that every file that `checkpoint.json` names is there and long enough; its content is checked when read.

    Raises:
        ValueError: one is not.
    """
    ends: dict[int, int] = {}
    for tensor in tensors.values():
        row_bytes = torch.Size(tensor["shape"][1:]).numel() * getattr(torch, tensor["dtype"]).itemsize
        for shard in tensor["shards"]:
            end = shard["start"] + (shard["rows"][1] - shard["rows"][0]) * row_bytes
            ends[shard["rank"]] = max(end, ends.get(shard["rank"], 0))
    for rank, end in sorted(ends.items()):
        path = folder / file_of(rank)
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size < end:
            raise ValueError(f"{path} ends at byte {path.stat().st_size}; expected at least {end}")


def write_index(folder: Path, content: dict[str, Any]) -> None:
    """Write `checkpoint.json` and sync it and the folder's entries to the disk."""
    # The shards' checksums are in here, so this one covers the whole checkpoint.
    text = json.dumps({"format": _FORMAT, "crc32": _digest(content), "content": content})
    with (folder / INDEX).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()  # from Python's buffer to the system, which `fsync` then waits for
        os.fsync(file.fileno())
    sync_folder(folder)


def read_index(folder: Path) -> dict[str, Any]:
    """What `write_index` wrote.

    Raises:
        ValueError: it is missing, damaged, or of another version of this format.
    """
    path = folder / INDEX
    try:
        # Python's JSON reads floats exactly as it wrote them, NaN too, so the digest can be computed from the values.
        stored = json.loads(path.read_text(encoding="utf-8"))
        version, content = stored["format"], stored["content"]
        is_whole = stored["crc32"] == _digest(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if version != _FORMAT:
        raise ValueError(f"{path} has format {version}; expected {_FORMAT}")
    if not is_whole:
        raise ValueError(f"{path} is damaged: its checksum differs")
    assert isinstance(content, dict)
    return content


def sync_folder(folder: Path) -> None:
    """Sync new and renamed entries of a folder to the disk: the files' own `fsync` does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dtype_name(dtype: torch.dtype) -> str:
    """A type as `checkpoint.json` has it, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def _digest(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
