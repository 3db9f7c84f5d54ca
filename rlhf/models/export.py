"""Writes a trained model as a folder for plain transformers, one tensor in memory at a time.

The header of a safetensors file comes first and says where everything is, which follows from names, shapes and types
alone. So tensors may arrive in any order: each is merged with its adapters and goes straight to its place. The folder
appears complete or not at all, and nothing in it is pickled.
Left out: gathering (the engine), `stage.json` (the stages).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models import lora
from rlhf.models.weights import persistent_buffers, plain_name
from rlhf.runtime.atomic_files import writing
from rlhf.text.tokenizer import stop_token_ids

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
    """Name, shape and type of a tensor that is still to come."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.shape.numel() * self.dtype.itemsize


class SafetensorsFile:
    """A safetensors file that is written tensor by tensor; complete once every entry was written."""

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
            OSError: With the name of the file, such as on a full disk.
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


def export(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    write: bool = True,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2_000_000_000,
) -> float | None:
    """Write `module` with the values `tensors` to `folder`, replacing what is there.

    With adapters, `folder` holds the merged model and `folder/adapter` the adapters in PEFT's format.

    Args:
        module: A spec's module; its parameters are not read, only their names and `module.config`.
        tensors: Each name of `module.named_parameters()` with its whole tensor on the CPU, in any order.
        folder: Appears when it is complete.
        tokenizer: Saved with its chat template; its pad token goes into the configuration.
        write: False takes the tensors and writes nothing, as all ranks but one do while an engine gathers.
        dtype: Floating-point tensors are stored in this type; None keeps that of the module's parameter.
        max_shard_bytes: No file holds more, except for one tensor that is larger.

    Returns:
        With adapters, the share of their change that the type of the merged weights keeps (`lora.MergePrecision`).

    Raises:
        RunError: The disk is full, or cannot be written; the earlier folder is unchanged.
    """
    if not write:
        deque(tensors, maxlen=0)
        return None
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    precision = lora.MergePrecision()
    adapters: dict[str, Tensor] = {}
    try:
        with writing(folder):
            partial.mkdir(parents=True)
            plain = _plain_tensors(module, tensors, adapters=adapters, dtype=dtype, precision=precision)
            entries = _entries(module, dtype)
            _write_tensors(partial, plain, entries=entries, max_shard_bytes=max_shard_bytes)
            _write_configs(partial, module, tokenizer=tokenizer, dtype=_dtype_of(entries))
            tokenizer.save_pretrained(partial)
            if adapters:
                base = cast(Any, module).config.name_or_path
                lora.save_adapter(partial / "adapter", module, adapters=adapters, base=base)
            _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # an unfinished folder would keep the disk full
    return precision.share if adapters else None


def plain_tensors(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """All `module.named_parameters()` as plain transformers names them: adapters merged, and with buffers."""
    return _plain_tensors(module, tensors, adapters={}, dtype=None, precision=lora.MergePrecision())


def _entries(module: nn.Module, dtype: torch.dtype | None) -> list[Entry]:
    """The tensors of the model without adapters, with buffers, in the order of its modules."""
    own = [(plain_name(name), p) for name, p in module.named_parameters() if ".lora_" not in name]
    return [
        Entry(name, tensor.shape, dtype if dtype and tensor.is_floating_point() else tensor.dtype)
        for name, tensor in (*own, *persistent_buffers(module))
    ]


def _dtype_of(entries: list[Entry]) -> torch.dtype:
    """The type to name in `config.json`: that of the last matrix."""
    matrices = [entry.dtype for entry in entries if len(entry.shape) > 1 and entry.name != "score.weight"]
    return matrices[-1] if matrices else torch.float32


def _plain_tensors(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    adapters: dict[str, Tensor],
    dtype: torch.dtype | None,
    precision: lora.MergePrecision,
) -> Iterator[tuple[str, Tensor]]:
    """The merged model's names and tensors, with buffers; the content of an adapter folder is put into `adapters`."""

    def keep_small(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        if ".lora_" in name or name == "score.weight":
            adapters[name] = tensor
        return name, tensor

    layers = lora.adapted_layers(module)
    if layers:
        passed = (keep_small(name, tensor) for name, tensor in tensors)
        tensors = lora.merge_adapters(passed, layers, dtype=dtype, precision=precision)
    yield from tensors
    for name, buffer in persistent_buffers(module):
        yield name, buffer.cpu()


def _write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, entries: list[Entry], max_shard_bytes: int
) -> None:
    """Write `model.safetensors`, or several files in the order of `entries` with an index; `tensors` in any order."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
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


def _write_configs(folder: Path, module: nn.Module, *, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
    config = copy.deepcopy(cast(Any, module).config)
    config.dtype, config.pad_token_id = dtype, tokenizer.pad_token_id
    config.save_pretrained(folder)
    if isinstance(module, PreTrainedModel):
        generation = copy.deepcopy(module.generation_config)
        generation.pad_token_id = tokenizer.pad_token_id
        generation.eos_token_id = _stop_tokens(tokenizer, generation)
        # Not `save_pretrained`: it refuses settings that published models carry, such as a temperature without
        # sampling.
        generation.to_json_file(folder / "generation_config.json")


def _stop_tokens(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig) -> int | list[int] | None:
    """The model's own, then those that also ended responses here: the EOS where it has none, and the end of a turn."""
    own = generation.eos_token_id
    listed = own if isinstance(own, list) else [own] if own is not None else []
    try:
        ends = stop_token_ids(tokenizer, generation)
    except ValueError:  # a template that does not render has ended no turn
        ends = (tokenizer.eos_token_id,)
    stops = [*listed, *(end for end in ends if end is not None and end not in listed)]
    return stops if len(stops) > 1 else next(iter(stops), None)


def _publish(partial: Path, folder: Path) -> None:
    """Put `partial` in the place of `folder`; at no time does an incomplete folder have that name."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
