"""Converts plain values and tensors to bytes and back, without pickle, for ranks to send each other.

The bytes are JSON followed by the raw memory of the tensors, so received ones cannot name code. Values come back
unchanged, bit for bit: None, bool, int, float, str, CPU tensors, and lists, tuples and dictionaries of them.
Left out: objects of classes; send their fields.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import torch
from torch import Tensor

_LENGTH = struct.Struct("<Q")  # the length of the JSON, in front of it


def to_bytes(value: Any) -> bytes:
    """`value` as bytes.

    Raises:
        TypeError: it holds anything but plain values and tensors.
    """
    tensors: list[Tensor] = []
    packed = _packed(value, tensors)
    layout = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
    header = json.dumps([packed, layout]).encode()
    raw = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return b"".join([_LENGTH.pack(len(header)), header, *raw])


def from_bytes(data: bytes | memoryview) -> Any:
    """The value that `to_bytes` was given."""
    at = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    packed, layout = json.loads(bytes(data[_LENGTH.size : at]))
    tensors = []
    for name, shape in layout:
        dtype: torch.dtype = getattr(torch, name)
        begin, at = at, at + math.prod(shape) * dtype.itemsize
        memory = bytearray(data[begin:at])  # a copy: aligned, and the message can be freed
        flat = torch.frombuffer(memory, dtype=dtype) if memory else torch.empty(0, dtype=dtype)
        tensors.append(flat.reshape(shape))
    return _unpacked(packed, tensors)


def _packed(value: Any, tensors: list[Tensor]) -> Any:
    """`value` as JSON; what JSON lacks becomes a dictionary of one key, and tensors are appended to `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if type(value) is list:
        return [_packed(item, tensors) for item in value]
    if type(value) is tuple:
        return {"tuple": [_packed(item, tensors) for item in value]}
    if type(value) is dict:
        return {"dict": [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]}
    raise TypeError(f"a {type(value).__name__} cannot be sent to other ranks: send plain values and tensors")


def _unpacked(packed: Any, tensors: list[Tensor]) -> Any:
    """The inverse of `_packed`."""
    if isinstance(packed, list):
        return [_unpacked(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpacked(item, tensors) for item in content)
    return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in content}
