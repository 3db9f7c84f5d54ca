"""Writes safetensors files one tensor at a time, in any order, each straight to its place.

The header of such a file comes first and says where everything is, which follows from names, shapes and types alone.
So nothing is collected: what is in memory is the tensor that is being written. Left out: reading (`model_folder.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


class Entry(NamedTuple):
    """Type and shape of a tensor that is still to come."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.shape.numel() * self.dtype.itemsize


class SafetensorsFile:
    """One file; complete when every entry was written."""

    def __init__(self, path: Path, entries: Iterable[Entry]) -> None:
        """Write the header. The entries with the largest elements come first, so that all are aligned."""
        self.missing = {entry.name: entry for entry in entries}
        ordered = sorted(self.missing.values(), key=lambda entry: -entry.dtype.itemsize)
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._start, end = {}, 0
        for entry in ordered:
            self._start[entry.name], end = end, end + entry.nbytes
            place = [self._start[entry.name], end]
            table[entry.name] = {"dtype": _TYPES[entry.dtype], "shape": [*entry.shape], "data_offsets": place}
        header = json.dumps(table, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        self._data = len(header) + 8
        self._file = path.open("wb", buffering=0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.truncate(self._data + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place.

        Raises:
            OSError: with the name of the file, such as on a full disk.
        """
        entry = self.missing.pop(name)
        assert tensor.shape == entry.shape, f"{name}: {tuple(tensor.shape)} arrived, not {tuple(entry.shape)}"
        values = tensor.detach().to(entry.dtype).contiguous()
        data = memoryview(values.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
        offset = self.offset_of(name)
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def offset_of(self, name: str) -> int:
        """Offset of a tensor's bytes in the file."""
        return self._data + self._start[name]

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing more can be written."""
        self._file.close()


class ShardedFiles:
    """`model.safetensors`, or several with an index where that would grow too large."""

    def __init__(self, folder: Path, entries: list[Entry], *, max_shard_bytes: int) -> None:
        """Plan the shards, in the order of `entries`, and write their headers."""
        shards = _shards(entries, max_shard_bytes)
        count = len(shards)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        self._folder = folder
        self._files = [SafetensorsFile(folder / name, shard) for name, shard in zip(names, shards, strict=True)]
        self._file_of = {entry.name: file for file, shard in zip(self._files, shards, strict=True) for entry in shard}
        self._index = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        self._total = sum(entry.nbytes for entry in entries)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place."""
        assert name in self._file_of, f"{name} is not part of the model"
        assert name in self._file_of[name].missing, f"{name} arrived twice"
        self._file_of[name].write(name, tensor)

    def finish(self) -> None:
        """Close all files; nothing may be missing."""
        self.close()
        missing = sorted(name for file in self._files for name in file.missing)
        assert not missing, f"never arrived: {missing[:3]}"
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._index.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Close the file; nothing more can be written."""
        for file in self._files:
            file.close()


def _shards(entries: list[Entry], max_bytes: int) -> list[list[Entry]]:
    """Consecutive entries of at most `max_bytes` together, or one entry that is larger."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards
