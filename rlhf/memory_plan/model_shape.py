"""Builds models on meta from a configuration alone, for the planner, which asks how large they are and never runs them.

Their modules come from the functions that the stages build them with; there are no weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlhf.config.run_config import Embedded
from rlhf.config.stage_configs import LoraConfig, ModelKind
from rlhf.models.causal_lm import causal_lm_module
from rlhf.models.embedded import embedded_config
from rlhf.models.meta_init import ModelSpec, assemble, decoder_config
from rlhf.models.model_folder import local_folder
from rlhf.models.scalar_head import ScalarHeadModel, classifier_module
from rlhf.models.transforms import first_layers, with_dropout


@dataclass(frozen=True)
class ModelShape:
    """A model without weights, which need not exist anywhere; equal shapes take equal memory."""

    source: str | Embedded
    """A folder with a `config.json`, a hub id, of which nothing else is fetched, or an embedded model."""
    kind: ModelKind
    num_layers: int = 0
    """How many of its layers are used; 0 uses all."""
    dropout: float = 0.0
    """Every dropout probability of it."""
    lora: LoraConfig | None = None
    """Its adapters, of a rank above 0; None for a model without."""

    def __hash__(self) -> int:
        return hash(repr(self))  # settings have no hash

    @property
    def runs(self) -> tuple[int, int]:
        """How many blocks lie below those with adapters of their own, and how many others there are."""
        depth = self.num_layers or int(_config(self.source).num_hidden_layers)
        top = self.lora.top_layers if self.lora is not None else 0
        return (depth - top, top) if top else (0, depth)

    @property
    def whole(self) -> ModelSpec:
        """The model itself, on meta; shared, so not to be changed."""
        return _built(self, self.runs)

    @property
    def is_regular(self) -> bool:
        """Whether the blocks of each run are alike, so that short runs say what long ones take."""
        spec, lower = self.whole, self.runs[0]
        blocks = [[(name, p.shape, p.requires_grad) for name, p in block.named_parameters()] for block in spec.blocks]
        lists = [value for value in spec.config.to_dict().values() if isinstance(value, list)]
        per_block = [blocks, *(value for value in lists if len(value) == len(blocks))]
        return all(value == run[0] for values in per_block for run in (values[:lower], values[lower:]) for value in run)

    def build(self, runs: tuple[int, int]) -> ModelSpec:
        """A model of the caller's own whose runs have so many blocks."""
        return copy.deepcopy(_built(self, runs))  # quicker than building it


@lru_cache(maxsize=64)
def _built(shape: ModelShape, runs: tuple[int, int]) -> ModelSpec:
    config = first_layers(with_dropout(_config(shape.source), shape.dropout), sum(runs))
    module: nn.Module
    if shape.kind is ModelKind.causal_lm:
        module = causal_lm_module(config)
    else:
        config.num_labels = 1
        module = ScalarHeadModel(classifier_module(config), config)
    lora = shape.lora and replace(shape.lora, top_layers=runs[1] if runs[0] else 0)
    return assemble(module, _NoWeights(), config=config, new={}, lora=lora, seed=0)


class _NoWeights:
    """Stands where a spec has its weights."""

    def read(self, name: str, rows: slice) -> Tensor:
        raise AssertionError(f"{name}[{rows}] of a model that has a shape only")


@lru_cache(maxsize=16)
def _config(source: str | Embedded) -> Any:  # transformers is behind `rlhf.models`
    if isinstance(source, Embedded):
        return embedded_config(source)
    return decoder_config(local_folder(Path(source), weights=False))
