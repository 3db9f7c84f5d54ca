"""Every setting of a run: one dataclass per group of `conf/`, closed, typed and validated.

`conf/` holds the numbers; the text under a field says its unit and consequence. This is the root and the door: the
groups that stages share are in `config_groups.py`, the engine in `config_engine.py`, the stages in `config_stages.py`,
what is done with their models in `config_uses.py`, and all are imported from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf.config_engine import Device, EngineConfig, Moments, Precision, Tier
from rlhf.config_groups import (
    BadRows,
    CheckpointConfig,
    DataConfig,
    Embedded,
    LaunchConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    Progress,
    RewrittenTurns,
    Schedule,
    SourceConfig,
    StageDataConfig,
    TrackingConfig,
    WandbMode,
    accumulation,
    divisible,
)
from rlhf.config_stages import (
    AdvantageKind,
    KLConfig,
    KLKind,
    NoEndKind,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    ScoreConfig,
    SFTConfig,
    StageConfig,
    SupervisedConfig,
)
from rlhf.config_uses import ChatConfig, EvalConfig, PromptStyle

__all__ = [
    "AdvantageKind",
    "BadRows",
    "ChatConfig",
    "CheckpointConfig",
    "DataConfig",
    "Device",
    "Embedded",
    "EngineConfig",
    "EvalConfig",
    "KLConfig",
    "KLKind",
    "LaunchConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelConfig",
    "Moments",
    "NoEndKind",
    "OptimizerConfig",
    "PPOConfig",
    "Precision",
    "Progress",
    "PromptStyle",
    "RewardConfig",
    "RewrittenTurns",
    "RunConfig",
    "SFTConfig",
    "STAGES",
    "SamplingConfig",
    "Schedule",
    "ScoreConfig",
    "SourceConfig",
    "StageConfig",
    "StageDataConfig",
    "SupervisedConfig",
    "Tier",
    "TrackingConfig",
    "USES",
    "WandbMode",
    "accumulation",
    "divisible",
]

STAGES = ("sft", "reward", "ppo")
"""The stages, in the order in which they run."""
USES = ("eval", "chat")
"""What can be done with the models afterwards, in the order in which it is done; selected as stages are."""


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
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When a stage saves itself, and what is kept."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """What the plan may use."""
    plan: bool = False
    """Print the memory plan and stop; no weights are loaded."""
    sft: SFTConfig | None = None
    """First stage, or null."""
    reward: RewardConfig | None = None
    """Second stage, or null."""
    ppo: PPOConfig | None = None
    """Third stage, or null."""
    eval: EvalConfig | None = None
    """Evaluation, or null."""
    chat: ChatConfig | None = None
    """Chat, or null."""

    @property
    def stages(self) -> list[str]:
        """Names of the selected stages, in the order in which they run."""
        return [stage for stage in STAGES if getattr(self, stage) is not None]

    @property
    def uses(self) -> list[str]:
        """Names of what is done with the models afterwards, in that order."""
        return [use for use in USES if getattr(self, use) is not None]
