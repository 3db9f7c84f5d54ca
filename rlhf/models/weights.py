"""Sources of parameter values, read row by row: files, seeds, or a model that transformers converts.

A sharded engine asks for `read(name, rows)` and gets just these rows, so no rank ever holds the model:

* `SafetensorsWeights`: straight from memory-mapped files, under the names that checkpoints use.
* `LoadedWeights`: from a model that transformers had to load and convert (mixtures of experts, old layouts).
* `SeededWeights`: one of the above, plus parameters that no checkpoint has (adapters, a new head), drawn from a
  generator that knows the seed and the name alone, so that every rank and every number of ranks agrees.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from rlhf.models.model_folder import Checkpoint

logger = logging.getLogger(__name__)


class Weights(Protocol):
    """The values of a module's parameters."""

    def read(self, name: str, rows: slice) -> Tensor:
        """Rows of the parameter called `name` in the module.

        Returns:
            `parameter[rows]` on the CPU in the checkpoint's type (new parameters: fp32). Vectors are sliced the same
            way; a scalar parameter is returned whole.
        """
        ...


class SafetensorsWeights:
    """Weights in a checkpoint whose names map one to one to the module's."""

    def __init__(self, checkpoint: Checkpoint, key_of: Mapping[str, str]) -> None:
        """Serve `checkpoint`; `key_of` maps a parameter's name to the tensor's name in the files."""
        self._checkpoint = checkpoint
        self._key_of = key_of

    def __contains__(self, name: object) -> bool:
        return name in self._key_of

    def read(self, name: str, rows: slice) -> Tensor:
        """See `Weights.read`; touches only these rows of the file."""
        return self._checkpoint.read(self._key_of[name], rows)


class LoadedWeights:
    """Weights in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Serve `tensors`, by the module's names."""
        self._tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def read(self, name: str, rows: slice) -> Tensor:
        """See `Weights.read`."""
        tensor = self._tensors[name]
        return tensor[rows] if tensor.dim() else tensor


@dataclass(frozen=True)
class NewParameter:
    """A parameter that starts from random numbers."""

    shape: torch.Size
    fill: Callable[[Tensor, torch.Generator], object]
    """Fills the fp32 tensor it is given, with the generator it is given."""

    def values(self, name: str, seed: int) -> Tensor:
        """The whole parameter, a function of `name` and `seed` alone."""
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        values = torch.empty(self.shape)
        self.fill(values, generator)
        return values


class SeededWeights:
    """Loaded weights and new parameters side by side; also knows the names that PEFT gives to adapted layers."""

    def __init__(self, loaded: Weights, new: Mapping[str, NewParameter], *, seed: int) -> None:
        """Serve `new` from random numbers of `seed`, everything else from `loaded`."""
        self._loaded = loaded
        self._new = new
        self._seed = seed

    def read(self, name: str, rows: slice) -> Tensor:
        """See `Weights.read`."""
        if name in self._new:
            return self._new[name].values(name, self._seed)[rows]
        return self._loaded.read(name.replace(".base_layer.", "."), rows)


def open_weights(
    module: PreTrainedModel, checkpoint: Checkpoint, *, optional: Collection[str] = ()
) -> SafetensorsWeights | LoadedWeights:
    """The weights of `module` in `checkpoint`, and the module's persistent buffers filled from it.

    A checkpoint that transformers converts while it loads (experts in one tensor each, an older layout) has no one to
    one names. Such a model is loaded whole by transformers, once, and a warning says what that costs.

    Args:
        module: Parameters on meta, before adapters.
        checkpoint: Where its values are.
        optional: Names that may be absent, such as the head that a causal language model lacks.

    Raises:
        ValueError: A parameter has no value, or one of another shape.
    """
    key_of = plain_keys(module, checkpoint, optional=optional)
    weights: SafetensorsWeights | LoadedWeights
    if key_of is None:
        weights = _load_whole(module, checkpoint, optional=optional)
    else:
        weights = SafetensorsWeights(checkpoint, key_of)
    for name, buffer in persistent_buffers(module):
        if name in weights:
            buffer.copy_(weights.read(name, slice(None)))
    return weights


def plain_keys(
    module: PreTrainedModel, checkpoint: Checkpoint, *, optional: Collection[str] = ()
) -> dict[str, str] | None:
    """The tensor of each parameter by name; None where transformers must rename or convert them while it loads.

    Reads no tensor, so that a model is examined before anything is trained.

    Raises:
        ValueError: A parameter has no value, or one of another shape.
    """
    key_of = _keys_by_name(module, checkpoint)
    missing = [name for name, _ in module.named_parameters() if name not in key_of and name not in optional]
    rules = get_model_conversion_mapping(module)
    changing = rules if missing else [rule for rule in rules if isinstance(rule, WeightConverter)]
    if any(rule.compiled_sources.search(key) for rule in changing for key in checkpoint.keys()):  # noqa: SIM118
        return None
    _require_all(module, checkpoint, missing=missing)
    _require_shapes(module, checkpoint, key_of=key_of)
    return key_of


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the buffers that belong in a checkpoint."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, tensor in module.state_dict().items():
        if name not in parameters:
            yield name, tensor


class _Alias(NamedTuple):
    canonical: str
    name: str


def _aliases(module: nn.Module) -> Iterator[_Alias]:
    """Every name of every parameter and persistent buffer, with the one that `named_parameters` gives it first."""
    canonical: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield _Alias(canonical.setdefault(id(parameter), name), name)
    for name, _ in persistent_buffers(module):
        yield _Alias(name, name)


def _keys_by_name(module: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter name -> checkpoint key; a checkpoint may carry the base model's prefix or lack it."""
    prefix = f"{module.base_model_prefix}."
    found: dict[str, str] = {}
    for canonical, name in _aliases(module):
        for key in (name, name.removeprefix(prefix), prefix + name):
            if key in checkpoint:
                found.setdefault(canonical, key)
    return found


def _require_all(module: nn.Module, checkpoint: Checkpoint, *, missing: list[str]) -> None:
    if missing:
        raise ValueError(
            f"Model folder {checkpoint.folder}: {len(missing)} parameters of {type(module).__name__} have no value, "
            f"such as {missing[:3]}. Is this the whole checkpoint, and does its `config.json` belong to it?"
        )


def _require_shapes(module: nn.Module, checkpoint: Checkpoint, *, key_of: Mapping[str, str]) -> None:
    for name, parameter in module.named_parameters():
        if name in key_of and checkpoint.shape(key_of[name]) != parameter.shape:
            raise ValueError(
                f"Model folder {checkpoint.folder}: tensor {key_of[name]!r} has shape "
                f"{tuple(checkpoint.shape(key_of[name]))}, but `config.json` makes it {tuple(parameter.shape)}."
            )


def _load_whole(module: PreTrainedModel, checkpoint: Checkpoint, *, optional: Collection[str]) -> LoadedWeights:
    logger.warning(
        "%s: the tensors of this checkpoint are converted by transformers while loading, so every process reads the "
        "whole model (%.2f GB in fp32) into host memory before it is sharded.",
        checkpoint.folder,
        sum(parameter.numel() for parameter in module.parameters()) * 4 / 1e9,
    )
    found: Any = type(module).from_pretrained(
        checkpoint.folder, config=copy.deepcopy(module.config), dtype="auto", output_loading_info=True
    )
    loaded, report = found
    _require_all(module, checkpoint, missing=sorted(set(report["missing_keys"]) - set(optional)))
    present = {name: tensor for name, tensor in loaded.state_dict().items() if name not in report["missing_keys"]}
    return LoadedWeights(present)
