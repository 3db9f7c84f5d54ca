"""The root of the configuration: one run."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf.config.groups import DataConfig, EngineConfig, LaunchConfig, ModelConfig, TrackingConfig
from rlhf.config.stages import PPOConfig, RewardConfig, SFTConfig

STAGES = ("sft", "reward", "ppo")
"""The stages, in the order in which they run."""


@dataclass(kw_only=True)
class RunConfig:
    """A whole run."""

    name: str
    """Name of the run: its output folder and its W&B group."""
    output_dir: str
    """Where everything goes (the README shows the tree)."""
    seed: int = 0
    """Seed of every stage that does not set its own."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How the run is started."""
    model: ModelConfig
    """The pretrained model."""
    engine: EngineConfig
    """The engine of every stage."""
    data: DataConfig = field(default_factory=DataConfig)
    """What the stages learn from."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """What is shown and recorded."""
    sft: SFTConfig | None = None
    """First stage, or null."""
    reward: RewardConfig | None = None
    """Second stage, or null."""
    ppo: PPOConfig | None = None
    """Third stage, or null."""

    @property
    def stages(self) -> list[str]:
        """Names of the selected stages, in the order in which they run."""
        return [stage for stage in STAGES if getattr(self, stage) is not None]
