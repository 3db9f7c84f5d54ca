"""The settings of what is done with models that stages have made: evaluation and chat."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf.config_engine import EngineConfig
from rlhf.config_groups import at_least
from rlhf.config_stages import SamplingConfig, inherited


@dataclass(kw_only=True)
class EvalConfig:
    """What a model says to held-out prompts, judged, and compared with another model."""

    selected: bool = False
    """Set by the YAML of this choice: whether this run evaluates."""
    engine: EngineConfig = field(default_factory=lambda: inherited(EngineConfig, "engine"))
    """The run's engine, unless overridden here."""
    model: str = "${output_dir}/ppo/actor"
    """What is evaluated: a folder or a hub id."""
    against: str | None = "${output_dir}/sft/model"
    """What it is compared with; null compares with nothing."""
    seed: int = "${seed}"  # type: ignore[assignment]
    """Seed of the sampling."""


@dataclass(kw_only=True)
class ChatConfig:
    """A conversation in the terminal."""

    selected: bool = False
    """Set by the YAML of this choice: whether this run talks."""
    engine: EngineConfig = field(default_factory=lambda: inherited(EngineConfig, "engine"))
    """The run's engine, unless overridden here."""
    model: str = "${output_dir}/ppo/actor"
    """Who answers: a folder or a hub id."""
    beside: str | None = None
    """A second model that answers the same; null is nobody."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How answers are drawn; a temperature of 0 takes the likeliest token."""
    max_response_tokens: int = 256
    """Where an answer is cut."""
    seed: int = "${seed}"  # type: ignore[assignment]
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_response_tokens")
