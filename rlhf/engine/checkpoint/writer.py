"""The files of a checkpoint: raw bytes, one file of each rank, and one JSON that says what is where.

Bytes are checked in blocks, so that a part can be read and trusted without reading the rest. Nothing is pickled.
Left out: which bytes (`storage.py`), and when a checkpoint counts as complete (`model_folder.py`).
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections import deque
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 4 << 20
"""Bytes that share a checksum."""
INDEX = "checkpoint.json"
_FORMAT = 1


class Chunk(NamedTuple):
    """Where a part of a tensor is."""

    file: int  # rank that wrote it
    start: int  # in bytes, as is `nbytes`
    nbytes: int
    checksums: list[int]  # crc32 of each block, the first of which begins at `start`


def file_of(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}.bin"


class Writing:
    """One rank's file while it is written: some tensors at once, others from a copy, in a thread.

    What goes wrong is kept in `error` and never raised here: whether a checkpoint counts, all ranks decide together.
    """

    def __init__(self, path: Path) -> None:
        self.checksums: dict[int, list[int]] = {}
        self.error = ""
        self.nbytes = 0
        self._path = path
        self._waiting: deque[tuple[int, Tensor]] = deque()
        self._thread: Thread | None = None
        self._cancelled = Event()
        self._file = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as error:
            self.error = f"{path}: {error.strerror}"

    def place(self, nbytes: int) -> int:
        """Where the next `nbytes` go."""
        self.nbytes += nbytes
        return self.nbytes - nbytes

    def write(self, start: int, rows: Tensor) -> None:
        """Write `rows` before returning."""
        data = memoryview(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        checksums = self.checksums.setdefault(start, [])
        for at in range(0, len(data), BLOCK):
            if self.error or self._cancelled.is_set():
                return
            block = data[at : at + BLOCK]
            checksums.append(zlib.crc32(block))
            try:
                _write_all(self._file, block, offset=start + at)
            except OSError as error:
                self.error = f"{self._path}: {error.strerror}"

    def stage(self, start: int, rows: Tensor) -> None:
        """Copy `rows` to host memory before returning, to be written by the thread."""
        self._waiting.append((start, rows.detach().to("cpu", copy=True)))

    def begin(self, *, asynchronous: bool) -> None:
        """Write what was staged and bring all of it to the disk, in a thread or before returning."""
        if asynchronous:
            self._thread = Thread(target=self._drain, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._drain()

    @property
    def is_busy(self) -> bool:
        """Whether the thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until everything is on the disk, or `error` says why not."""
        if self._thread is not None:
            self._thread.join()

    def cancel(self) -> None:
        """Give up what is not written yet."""
        self._cancelled.set()
        self.wait()

    def _drain(self) -> None:
        while self._waiting:
            self.write(*self._waiting.popleft())
        if self._file >= 0:
            try:
                os.fsync(self._file)
                os.close(self._file)
            except OSError as error:
                self.error = self.error or f"{self._path}: {error.strerror}"


def _write_all(file: int, data: memoryview, *, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def read_bytes(path: Path, chunk: Chunk, *, begin: int, end: int) -> memoryview:
    """Bytes `begin` to `end` of a chunk, whose blocks are compared with their checksums.

    Raises:
        ValueError: the file is missing, too short, or not what was written.
    """
    first, result = begin // BLOCK, bytearray()
    try:
        with path.open("rb") as file:
            file.seek(chunk.start + first * BLOCK)
            for number in range(first, -(-end // BLOCK)):
                block = file.read(min(BLOCK, chunk.nbytes - number * BLOCK))
                _require_intact(path, block, number=number, chunk=chunk)
                result += block
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return memoryview(result)[begin - first * BLOCK : end - first * BLOCK]


def require_files(folder: Path, tensors: dict[str, Any]) -> None:
    """Every file that a table of contents names is there and long enough; what is in it shows when it is read.

    Raises:
        ValueError: one is not.
    """
    ends: dict[int, int] = {}
    for entry in tensors.values():
        itemsize = getattr(torch, entry["dtype"]).itemsize
        for part in entry["parts"]:
            end = part["start"] + math.prod(part["sizes"]) * itemsize
            ends[part["file"]] = max(end, ends.get(part["file"], 0))
    for rank, end in sorted(ends.items()):
        path = folder / file_of(rank)
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size < end:
            raise ValueError(f"{path} ends at byte {path.stat().st_size}; expected at least {end}")


def _require_intact(path: Path, block: bytes, *, number: int, chunk: Chunk) -> None:
    start, expected = chunk.start + number * BLOCK, min(BLOCK, chunk.nbytes - number * BLOCK)
    if len(block) < expected:
        raise ValueError(f"{path} ends at byte {start + len(block)}; expected at least {start + expected}")
    if zlib.crc32(block) != chunk.checksums[number]:
        raise ValueError(f"{path} is damaged: bytes {start} to {start + expected} are not what was written")


def write_index(folder: Path, content: dict[str, Any]) -> None:
    """Write `checkpoint.json` and bring it and the folder's entries to the disk."""
    text = json.dumps({"format": _FORMAT, "crc32": _digest(content), "content": content})
    with (folder / INDEX).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read_index(folder: Path) -> dict[str, Any]:
    """What `write_index` wrote.

    Raises:
        ValueError: it is missing, damaged, or of another version of this format.
    """
    path = folder / INDEX
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found, content = stored["format"], stored["content"]
        is_whole = stored["crc32"] == _digest(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if found != _FORMAT:
        raise ValueError(f"{path} has format {found}; expected {_FORMAT}")
    if not is_whole:
        raise ValueError(f"{path} is damaged: its checksum differs")
    assert isinstance(content, dict)
    return content


def sync_folder(folder: Path) -> None:
    """Bring new and renamed entries of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
