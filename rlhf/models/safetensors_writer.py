"""Writes safetensors files one tensor at a time, in any order, each straight to its place.

The header of such a file comes first and says where everything is, which follows from names, shapes and types alone.
So nothing is collected: what is in memory is the tensor that is being written. Left out: reading (`model_folder.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
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
        assert name in self.missing, f"{name} arrived twice, or is not part of this file"
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


def write_model(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, entries: list[Entry], max_shard_bytes: int
) -> None:
    """Write `model.safetensors`, or several files with an index where that would grow too large.

    Args:
        folder: Where the files appear.
        tensors: The tensor of each entry, in any order.
        entries: All tensors of the model; shards follow their order.
        max_shard_bytes: No file holds more, except for one tensor that is larger.
    """
    shards = _shards(entries, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    index = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    with ExitStack() as stack:
        files: dict[str, SafetensorsFile] = {}
        for name, shard in zip(names, shards, strict=True):
            files[name] = SafetensorsFile(folder / name, shard)
            stack.callback(files[name].close)
        for name, tensor in tensors:
            assert name in index, f"{name} is not part of the model"
            files[index[name]].write(name, tensor)
    missing = sorted(name for file in files.values() for name in file.missing)
    assert not missing, f"never arrived: {missing[:3]}"
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in entries)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        text = json.dumps(content, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


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
