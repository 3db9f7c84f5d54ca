"""The settings of what is done with models that stages have made: evaluation and chat."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

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


class PromptStyle(StrEnum):
    """What a model reads: a conversation in its chat template, or what was typed as it is, each line by itself."""

    template = "template"
    plain = "plain"
    plain_if_own = "plain_if_own"


@dataclass(kw_only=True)
class ChatConfig:
    """A conversation in the terminal."""

    selected: bool = False
    """Set by the YAML of this choice: whether this run talks."""
    engine: EngineConfig = field(default_factory=lambda: inherited(EngineConfig, "engine"))
    """The run's engine, unless overridden here."""
    model: str | None = None
    """Who answers: a folder or a hub id; null is the last policy of the output folder, ppo/actor before sft/model."""
    beside: str | None = None
    """A second model that answers the same; null is nobody."""
    prompts: PromptStyle = PromptStyle.template
    """plain_if_own: plain for a model of this output folder, whose data are plain text, and for the one beside it."""
    system: str = ""
    """System message of the conversation; empty is none."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How answers are drawn; a temperature of 0 takes the likeliest token."""
    max_response_tokens: int = 256
    """Where an answer is cut."""
    seed: int = "${seed}"  # type: ignore[assignment]
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_response_tokens")
