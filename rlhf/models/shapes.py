"""Specs from a configuration alone, for whoever asks how large a model is and never runs it.

Modules, adapters and what learns are those of `causal_lm.py` and `scalar_head.py`; there are no weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from rlhf.config.model_config import Embedded, LoraConfig
from rlhf.config.roles import ModelKind
from rlhf.models.causal_lm import causal_lm_module
from rlhf.models.embedded import embedded_config
from rlhf.models.meta_init import decoder_config, skeleton
from rlhf.models.model_folder import local_folder
from rlhf.models.model_spec import ModelSpec, assemble
from rlhf.models.scalar_head import ScalarHeadModel
from rlhf.models.transforms import first_layers, with_dropout


@dataclass(frozen=True)
class Adapters:
    """What of `LoraConfig` has a shape."""

    rank: int
    targets: tuple[str, ...]
    top_layers: int

    @classmethod
    def of(cls, lora: LoraConfig) -> Adapters | None:
        """None for a model that is trained whole."""
        return cls(lora.rank, tuple(lora.targets), lora.top_layers) if lora.rank else None


@dataclass(frozen=True)
class Shape:
    """A model as far as a configuration says; its specs have no weights to read."""

    source: Path | str | Embedded
    """A folder with a `config.json`, a hub id, of which nothing else is fetched, or an embedded model."""
    head: ModelKind
    num_layers: int = 0
    """The first layers of it; 0 means all."""
    adapters: Adapters | None = None
    dropout: float = 0.0
    """Every dropout probability of it."""

    @property
    def plain(self) -> Shape:
        """Without adapters."""
        return replace(self, adapters=None)

    @property
    def runs(self) -> tuple[int, int]:
        """Blocks below those that have adapters, and the others."""
        depth = self.num_layers or int(_config(self.source).num_hidden_layers)
        top = self.adapters.top_layers if self.adapters else 0
        return (depth - top, top) if top else (0, depth)

    @property
    def is_regular(self) -> bool:
        """Whether the blocks of each run are alike, so that shorter runs say what longer ones take."""
        return _is_regular(self)

    @property
    def whole(self) -> ModelSpec:
        """All of it; made once, so not to be changed."""
        return _whole(self)

    def with_runs(self, lower: int, upper: int) -> ModelSpec:
        """A model of its own whose runs have so many blocks."""
        config = first_layers(with_dropout(_config(self.source), self.dropout), lower + upper)
        if self.head is ModelKind.causal_lm:
            module = causal_lm_module(config)
        else:
            config.num_labels = 1
            module = ScalarHeadModel(skeleton(AutoModelForSequenceClassification, config), config)
        lora = None
        if self.adapters is not None:
            top = upper if lower else 0
            lora = LoraConfig(rank=self.adapters.rank, targets=list(self.adapters.targets), top_layers=top)
        return assemble(module, _NoWeights(), config=config, new={}, lora=lora, seed=0)


@lru_cache(maxsize=16)
def _whole(shape: Shape) -> ModelSpec:
    return shape.with_runs(*shape.runs)


@lru_cache(maxsize=16)
def _is_regular(shape: Shape) -> bool:
    spec, lower = shape.whole, shape.runs[0]
    kinds = [tuple((name, p.shape, p.requires_grad) for name, p in block.named_parameters()) for block in spec.blocks]
    settings = spec.config.to_dict().values()
    lists = [value for value in settings if isinstance(value, list) and len(value) == len(kinds)]
    return all(len(set(map(repr, part))) <= 1 for run in (kinds, *lists) for part in (run[:lower], run[lower:]))


class _NoWeights:
    """Stands where a spec has its weights."""

    def read(self, name: str, rows: slice) -> Tensor:
        raise AssertionError(f"{name}[{rows}] of a model that has a shape only")


@lru_cache(maxsize=16)
def _config(source: Path | str | Embedded) -> PreTrainedConfig:
    if isinstance(source, Embedded):
        return embedded_config(source)
    return decoder_config(local_folder(source, weights=False))
