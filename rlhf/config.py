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
    require,
)
from rlhf.config_numbers import Seed, Settings
from rlhf.config_stages import (
    POLICIES,
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
    "FOLDERS",
    "KLConfig",
    "KLKind",
    "LaunchConfig",
    "LoraConfig",
    "MemoryConfig",
    "ModelConfig",
    "Moments",
    "NoEndKind",
    "OptimizerConfig",
    "POLICIES",
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
FOLDERS = ("sft", "reward", *POLICIES)
"""Their folders: that of the third is called after its advantages."""
USES = ("eval", "chat")
"""What can be done with the models afterwards, in the order in which it is done; selected as stages are."""


@dataclass(kw_only=True)
class RunConfig(Settings):
    """A whole run."""

    name: str
    """Name of the run: its output folder and its W&B group."""
    output_dir: str
    """Where everything goes (the README shows the tree)."""
    seed: Seed = 0
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

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.name.strip()) and ".." not in self.name.split("/"),
            f"name={self.name!r}: expected a name for the run, of which its folder is made, without '..'.",
        )

    def title(self, stage: str) -> str:
        """What a stage is called in folders, tables and hints: the third after its advantages."""
        return self.ppo.title if stage == "ppo" and self.ppo is not None else stage

    def folder(self, stage: str) -> str:
        """Where a stage writes."""
        return f"{self.output_dir}/{self.title(stage)}"

    def stage_of(self, folder: str) -> str | None:
        """The stage of this run that writes a folder of this name; a run without a third one leaves its name open."""
        if folder in POLICIES:
            return "ppo" if self.ppo is None or self.ppo.title == folder else None
        return folder if folder in STAGES else None

    @property
    def stages(self) -> list[str]:
        """Names of the selected stages, in the order in which they run."""
        return [stage for stage in STAGES if getattr(self, stage) is not None]

    @property
    def uses(self) -> list[str]:
        """Names of what is done with the models afterwards, in that order."""
        return [use for use in USES if getattr(self, use) is not None]
