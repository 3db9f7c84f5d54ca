"""Write a trained model as a folder that plain transformers loads, without ever holding the model.

Tensors arrive one at a time, are merged with their adapters, and leave in shards. The folder appears complete or not at
all, and nothing in it is pickled. Left out: gathering (the engine), `stage.json` (the stages).
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models import lora
from rlhf.models.weights import persistent_buffers

_METADATA = {"format": "pt"}


def export(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    write: bool = True,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2_000_000_000,
) -> None:
    """Write `module` with the values `tensors` to `folder`, replacing what is there.

    With adapters, `folder` holds the merged model and `folder/adapter` the adapters in PEFT's format.

    Args:
        module: A blueprint's module; its parameters are not read, their names and `module.config` are.
        tensors: Each name of `module.named_parameters()` with its whole tensor on the CPU, in any order.
        folder: Appears when it is complete.
        tokenizer: Saved with its chat template; its pad token goes into the configuration.
        write: False takes the tensors and writes nothing: what all ranks but one do while an engine gathers.
        dtype: Floating-point tensors are stored in this type; None keeps theirs.
        max_shard_bytes: A shard is closed before it grows beyond this; about what is held in memory at once.
    """
    if not write:
        deque(tensors, maxlen=0)
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    adapters: dict[str, Tensor] = {}
    writer = _ShardWriter(partial, max_shard_bytes)
    for name, tensor in _plain_tensors(module, tensors, adapters=adapters):
        writer.add(name, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor)
    assert writer.names >= _plain_names(module), f"never arrived: {sorted(_plain_names(module) - writer.names)[:3]}"
    writer.finish()
    _write_model_config(partial, module.config, pad_id=tokenizer.pad_token_id, dtype=writer.dtype)
    tokenizer.save_pretrained(partial)
    if isinstance(module, PreTrainedModel):
        _write_generation_config(partial, module.generation_config, tokenizer=tokenizer)
    if adapters:
        _write_adapter(partial / "adapter", module, adapters=adapters)
    _publish(partial, folder)


class _ShardWriter:
    """Collects tensors into files of bounded size."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.names: set[str] = set()
        self.dtype = torch.float32  # of the last matrix: what `config.json` calls the model's type
        self._folder = folder
        self._max_bytes = max_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._written: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        assert name not in self.names, f"{name} arrived twice"
        if self._shard and self._shard_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        self.names.add(name)
        self.dtype = tensor.dtype if tensor.dim() > 1 and name != "score.weight" else self.dtype
        self._shard[name] = tensor.detach().contiguous()
        self._shard_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the last shard, then give all of them their final names."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._file(0).rename(self._folder / "model.safetensors")
            return
        final = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        for number, name in enumerate(final):
            self._file(number).rename(self._folder / name)
        files = {name: file for names, file in zip(self._written, final, strict=True) for name in names}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(files.items()))}
        _write_json(self._folder / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        save_file(self._shard, self._file(len(self._written)), metadata=_METADATA)
        self._written.append(list(self._shard))
        self._total_bytes += self._shard_bytes
        self._shard, self._shard_bytes = {}, 0

    def _file(self, number: int) -> Path:
        return self._folder / f"shard-{number}.safetensors"


def _plain_tensors(
    module: nn.Module, tensors: Iterable[tuple[str, Tensor]], *, adapters: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the plain model, buffers included; what an adapter folder needs is put into `adapters`."""
    folds = lora.folds(module)
    if folds:
        tensors = lora.fold_adapters(_set_aside(tensors, adapters), folds)
    yield from tensors
    for name, buffer in persistent_buffers(module):
        yield name, buffer.cpu()


def _set_aside(tensors: Iterable[tuple[str, Tensor]], adapters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Pass `tensors` through and keep the adapters and the head, which are small."""
    for name, tensor in tensors:
        if ".lora_" in name or name == "score.weight":
            adapters[name] = tensor
        yield name, tensor


def _plain_names(module: nn.Module) -> set[str]:
    names = [name for name, _ in module.named_parameters() if ".lora_" not in name]
    return {name.replace(".base_layer.", ".") for name in names}


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


def _write_adapter(folder: Path, module: nn.Module, *, adapters: dict[str, Tensor]) -> None:
    folder.mkdir()
    tensors = {lora.adapter_key(name): tensor.contiguous() for name, tensor in adapters.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata=_METADATA)
    config = lora.exported_config(module, base=module.config.name_or_path, has_head="score.weight" in adapters)
    config.save_pretrained(folder)


def _publish(partial: Path, folder: Path) -> None:
    """Put `partial` in the place of `folder`; at no time is there a folder of that name which is incomplete."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
