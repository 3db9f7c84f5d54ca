"""Settings of the pretrained model and of adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from rlhf.config.bounds import Natural, Positive, Settings, ShareBelowOne


class Embedded(StrEnum):
    """Models that the project can make without a model hub."""

    smollm2 = "smollm2"
    tiny = "tiny"


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """The pretrained model that the run starts from."""

    path: str
    """A folder, or a hub id such as `Qwen/Qwen3-0.6B` (the only thing that makes the run use the network)."""
    embedded: Embedded | None = None
    """Make this model at `path` first, if the folder is not there; null when `path` already is a model."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template; null keeps the tokenizer's own."""
    pad_token: str | None = None
    """Token to pad with; null finds one that never occurs in a text (see `rlhf/text/tokenizer.py`)."""


@dataclass(kw_only=True)
class LoraConfig(Settings):
    """Low-rank adapters (Hu et al. 2021), through PEFT."""

    rank: Natural
    """Rank of the adapters; 0 trains the whole model."""
    alpha: Positive = 32.0
    """Scale: an adapter adds alpha / rank times its product."""
    dropout: ShareBelowOne = 0.0
    """Dropout in front of the adapters; PPO needs 0."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers that get an adapter; `all-linear` is every one but the head."""
    top_layers: Natural = 0
    """Adapters only on the last layers, so that backward stops early; 0 means all layers."""
