"""Writes a trained model as a folder for plain transformers, one tensor in memory at a time.

Tensors arrive one at a time, are merged with their adapters, and go straight to their place in a file: what is held is
one layer, and the adapters. The folder appears complete or not at all, and nothing in it is pickled.
Left out: gathering (the engine), `stage.json` (the stages).
"""

from __future__ import annotations

import copy
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models import lora
from rlhf.models.safetensors_writer import Entry, write_model
from rlhf.models.weights import persistent_buffers
from rlhf.runtime.atomic_files import writing


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
        module: A spec's module; its parameters are not read, their names and `module.config` are.
        tensors: Each name of `module.named_parameters()` with its whole tensor on the CPU, in any order.
        folder: Appears when it is complete.
        tokenizer: Saved with its chat template; its pad token goes into the configuration.
        write: False takes the tensors and writes nothing: what all ranks but one do while an engine gathers.
        dtype: Floating-point tensors are stored in this type; None takes that of the module's parameter.
        max_shard_bytes: No file holds more, but for one tensor that is larger.

    Returns:
        With adapters, the share of their change that the type of the merged weights keeps (`lora.Survival`).

    Raises:
        RunError: the disk is full, or cannot be written; what was there is as it was.
    """
    if not write:
        deque(tensors, maxlen=0)
        return None
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    survival = lora.Survival()
    adapters: dict[str, Tensor] = {}
    try:
        with writing(folder):
            partial.mkdir(parents=True)
            plain = _plain_tensors(module, tensors, adapters=adapters, dtype=dtype, survival=survival)
            entries = _entries(module, dtype)
            write_model(partial, plain, entries=entries, max_shard_bytes=max_shard_bytes)
            _write_model_config(
                partial, cast(PreTrainedConfig, module.config), pad_id=tokenizer.pad_token_id, dtype=_dtype_of(entries)
            )
            tokenizer.save_pretrained(partial)
            if isinstance(module, PreTrainedModel):
                _write_generation_config(partial, module.generation_config, tokenizer=tokenizer)
            if adapters:
                base = cast(Any, module).config.name_or_path
                lora.save_adapter(partial / "adapter", module, adapters=adapters, base=base)
            _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # where it could not be finished, its room is needed
    return survival.share if adapters else None


def _entries(module: nn.Module, dtype: torch.dtype | None) -> list[Entry]:
    """The tensors of the plain model, with buffers, in the order of its modules."""
    own = [(name, p) for name, p in module.named_parameters() if ".lora_" not in name]
    plain = [(lora.plain_name(name), p) for name, p in own]
    return [
        Entry(name, tensor.shape, dtype if dtype and tensor.is_floating_point() else tensor.dtype)
        for name, tensor in (*plain, *persistent_buffers(module))
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
    survival: lora.Survival,
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the plain model, buffers included; what an adapter folder needs is put into `adapters`."""
    layers = lora.adapted_layers(module)
    if layers:
        tensors = lora.merge_adapters(_set_aside(tensors, adapters), layers, dtype=dtype, survival=survival)
    yield from tensors
    for name, buffer in persistent_buffers(module):
        yield name, buffer.cpu()


def _set_aside(tensors: Iterable[tuple[str, Tensor]], adapters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Pass `tensors` through and keep the adapters and the head, which are small."""
    for name, tensor in tensors:
        if ".lora_" in name or name == "score.weight":
            adapters[name] = tensor
        yield name, tensor


def _write_model_config(folder: Path, config: PreTrainedConfig, *, pad_id: int, dtype: torch.dtype) -> None:
    written = copy.deepcopy(config)
    written.dtype = dtype
    written.pad_token_id = pad_id
    written.save_pretrained(folder)


def _write_generation_config(folder: Path, config: GenerationConfig, *, tokenizer: PreTrainedTokenizerBase) -> None:
    written = copy.deepcopy(config)
    written.pad_token_id = tokenizer.pad_token_id
    if written.eos_token_id is None:
        written.eos_token_id = tokenizer.eos_token_id
    # Not `save_pretrained`: it refuses settings that published models carry, such as a temperature without sampling.
    written.to_json_file(folder / "generation_config.json")


def _publish(partial: Path, folder: Path) -> None:
    """Put `partial` in the place of `folder`; at no time is there a folder of that name which is incomplete."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
