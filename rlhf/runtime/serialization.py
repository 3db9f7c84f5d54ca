"""Plain values and tensors as bytes, and back: what ranks send each other, without pickle.

The bytes of received values cannot name code: they are JSON, followed by the raw memory of the tensors. Values come
back as they were, bit for bit: None, bool, int, float, str, lists, tuples, dictionaries and CPU tensors of them all.
Left out: classes; send their fields.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import torch
from torch import Tensor

_LENGTH = struct.Struct("<Q")  # of the JSON, in front of it


def to_bytes(value: Any) -> bytes:
    """`value` as bytes.

    Raises:
        TypeError: it holds something else than plain values and tensors.
    """
    tensors: list[Tensor] = []
    header = json.dumps(_packed(value, tensors)).encode()
    raw = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return b"".join([_LENGTH.pack(len(header)), header, *raw])


def from_bytes(data: bytes | memoryview) -> Any:
    """The value that `to_bytes` was given."""
    start = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    return _Unpacking(memoryview(data), start).value(json.loads(bytes(data[_LENGTH.size : start])))


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """`value` as JSON has it; what JSON has not is a dictionary of one key, and its tensors are added to `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if type(value) is list:
        return [_packed(item, tensors) for item in value]
    if type(value) is tuple:
        return {"tuple": [_packed(item, tensors) for item in value]}
    if type(value) is dict:
        return {"dict": [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]}
    raise TypeError(f"a {type(value).__name__} cannot be sent to other ranks: send plain values and tensors")


class _Unpacking:
    """The inverse of `_packed`, which takes the tensors in the same order."""

    def __init__(self, data: memoryview, start: int) -> None:
        self._data, self._at = data, start

    def value(self, packed: Any) -> Any:
        if isinstance(packed, list):
            return [self.value(item) for item in packed]
        if not isinstance(packed, dict):
            return packed
        ((kind, content),) = packed.items()
        if kind == "tensor":
            return self._tensor(getattr(torch, content[0]), shape=content[1])
        if kind == "tuple":
            return tuple(self.value(item) for item in content)
        return {self.value(key): self.value(item) for key, item in content}

    def _tensor(self, dtype: torch.dtype, *, shape: list[int]) -> Tensor:
        begin, self._at = self._at, self._at + math.prod(shape) * dtype.itemsize
        memory = bytearray(self._data[begin : self._at])  # a copy of its own: aligned, and the message can be freed
        return torch.frombuffer(memory, dtype=dtype).reshape(shape) if memory else torch.empty(shape, dtype=dtype)
