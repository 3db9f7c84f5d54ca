"""Where the values of a model's parameters come from.

A sharded engine calls `read(name, rows)` and gets just these rows, so no rank ever holds the whole model. They are read

* from memory-mapped safetensors files, if each parameter has a tensor there;
* otherwise from a model that transformers has loaded and converted (mixtures of experts, old layouts);
* for parameters that no checkpoint has (adapters, a new head) from random numbers that depend on the seed and the name
  alone, so that every rank and every number of ranks agrees.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from rlhf.models.model_folder import ModelFolder

logger = logging.getLogger(__name__)


class Weights(Protocol):
    """The values of a module's parameters."""

    def read(self, name: str, rows: slice) -> Tensor:
        """`parameter[rows]` of the parameter called `name`, on the CPU in its stored type (new parameters: fp32).

        Vectors are sliced the same way; a scalar parameter is returned whole.
        """
        ...


class StoredWeights(dict[str, Callable[[slice], Tensor]]):
    """Weights that were trained before: by parameter name, a function that reads rows of it."""

    def read(self, name: str, rows: slice) -> Tensor:
        """See `Weights.read`."""
        return self[name](rows)


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
    """Stored weights and new parameters side by side, under the names that PEFT gives to adapted layers."""

    def __init__(self, stored: Weights, new: Mapping[str, NewParameter], *, seed: int) -> None:
        """Draw the parameters in `new` from random numbers of `seed`, and read all others from `stored`."""
        self._stored, self._new, self._seed = stored, new, seed

    def read(self, name: str, rows: slice) -> Tensor:
        """See `Weights.read`."""
        if name in self._new:
            return self._new[name].values(name, self._seed)[rows]
        return self._stored.read(plain_name(name), rows)


def plain_name(name: str) -> str:
    """The name that a parameter of an adapted layer has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def open_weights(module: PreTrainedModel, files: ModelFolder, *, optional: Collection[str] = ()) -> StoredWeights:
    """The weights of `module` in a model folder; the module's persistent buffers are filled from it, too.

    If transformers converts tensors while it loads (experts in one tensor each, an older layout), names do not match
    one to one. Such a model is loaded whole by transformers, once, and a warning says what that costs.

    Args:
        module: Parameters on meta, before adapters.
        files: Where its values are.
        optional: Names that may be absent, such as the head that a causal language model lacks.

    Raises:
        ValueError: A parameter has no value, or one of another shape.
    """
    key_of = plain_keys(module, files, optional=optional)
    if key_of is None:
        weights = _load_whole(module, files, optional=optional)
    else:
        weights = StoredWeights({name: partial(files.read, key) for name, key in key_of.items()})
    for name, buffer in persistent_buffers(module):
        if name in weights:
            buffer.copy_(weights.read(name, slice(None)))
    return weights


def plain_keys(module: PreTrainedModel, files: ModelFolder, *, optional: Collection[str] = ()) -> dict[str, str] | None:
    """The name in the files of each parameter; None if transformers must rename or convert tensors while it loads.

    No tensor is read, so this also checks a model before anything is trained.

    Raises:
        ValueError: A parameter has no value, or one of another shape.
    """
    key_of = _keys_by_name(module, files)
    missing = [name for name, _ in module.named_parameters() if name not in key_of and name not in optional]
    rules = get_model_conversion_mapping(module)
    changing = rules if missing else [rule for rule in rules if isinstance(rule, WeightConverter)]
    if any(rule.compiled_sources.search(key) for rule in changing for key in files.keys()):  # noqa: SIM118
        return None
    _require_all(module, files, missing=missing)
    for name, parameter in module.named_parameters():
        if name in key_of and (found := files.shape(key_of[name])) != parameter.shape:
            raise ValueError(
                f"Model folder {files.folder}: tensor {key_of[name]!r} has shape {tuple(found)}, but `config.json` "
                f"makes it {tuple(parameter.shape)}."
            )
    return key_of


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the buffers that belong in a checkpoint."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return ((name, tensor) for name, tensor in module.state_dict().items() if name not in parameters)


def _keys_by_name(module: PreTrainedModel, files: ModelFolder) -> dict[str, str]:
    """Parameter name -> name in the files, which may have the base model's prefix or lack it."""
    prefix = f"{module.base_model_prefix}."
    tensors = [*module.named_parameters(remove_duplicate=False), *persistent_buffers(module)]
    first: dict[int, str] = {}  # a tied parameter goes by its first name; the files may have any of its names
    found: dict[str, str] = {}
    for alias, tensor in tensors:
        name = first.setdefault(id(tensor), alias)
        for key in (alias, alias.removeprefix(prefix), prefix + alias):
            if key in files:
                found.setdefault(name, key)
    return found


def _require_all(module: nn.Module, files: ModelFolder, *, missing: list[str]) -> None:
    if missing:
        raise ValueError(
            f"Model folder {files.folder}: {len(missing)} parameters of {type(module).__name__} have no value, "
            f"such as {missing[:3]}. Is this the whole checkpoint, and does its `config.json` belong to it?"
        )


def _load_whole(module: PreTrainedModel, files: ModelFolder, *, optional: Collection[str]) -> StoredWeights:
    logger.warning(
        "%s: the tensors of this checkpoint are converted by transformers while loading, so every process reads the "
        "whole model (%.2f GB in fp32) into host memory before it is sharded.",
        files.folder,
        sum(parameter.numel() for parameter in module.parameters()) * 4 / 1e9,
    )
    found: Any = type(module).from_pretrained(
        files.folder, config=copy.deepcopy(module.config), dtype="auto", output_loading_info=True
    )
    loaded, report = found
    absent = report["missing_keys"]
    _require_all(module, files, missing=sorted(set(absent) - set(optional)))
    present = {name: tensor for name, tensor in loaded.state_dict().items() if name not in absent}
    return StoredWeights({name: partial(_rows_of, tensor) for name, tensor in present.items()})


def _rows_of(tensor: Tensor, rows: slice) -> Tensor:
    return tensor[rows] if tensor.dim() else tensor
