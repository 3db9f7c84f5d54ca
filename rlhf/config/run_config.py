"""Settings of a whole run: the root of the configuration, and model, tracking, launch, checkpoints and memory.

`conf/` holds the numbers; the text under a field says its unit and its consequence. See also: the other files of this
folder, one per group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from rlhf.config.bounds import (
    Count,
    Natural,
    NonNegative,
    Positive,
    Seed,
    Settings,
    require,
    require_steps,
    steps_of_setting,
)
from rlhf.config.data_config import DataConfig
from rlhf.config.dpo_config import DPOConfig
from rlhf.config.engine_config import EngineConfig
from rlhf.config.eval_config import ChatConfig, EvalConfig
from rlhf.config.ppo_config import POLICIES, PPOConfig
from rlhf.config.stage_configs import (
    RewardConfig,
    SFTConfig,
    StageConfig,
    SupervisedConfig,
    TrainingConfig,
)


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


class WandbMode(StrEnum):
    """Mode of W&B; auto is online with a key and a reachable server, else offline. It never prompts."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class ProgressDisplay(StrEnum):
    """Progress display; auto is a bar on a terminal and plain lines elsewhere."""

    auto = "auto"
    bar = "bar"
    plain = "plain"
    quiet = "quiet"


@dataclass(kw_only=True)
class TrackingConfig(Settings):
    """Logging, W&B and the report."""

    wandb: WandbMode = WandbMode.auto
    """Mode of W&B."""
    project: str = "rlhf-pipeline"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null is the key's default."""
    progress: ProgressDisplay = ProgressDisplay.auto
    """Progress display on the terminal."""
    log_every: Count = 1
    """Optimizer steps (in PPO: iterations) between two rows of `metrics.jsonl`."""
    report: bool = True
    """Write `report.html` after each stage and of the whole run: some seconds each."""


SUPERVISED: dict[str, type[SupervisedConfig]] = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig}
"""The stages that learn from examples, in the order in which they run, with their settings."""
STAGES = (*SUPERVISED, "ppo")
"""The stages, in the order in which they run."""
FOLDERS = (*SUPERVISED, *POLICIES)
"""Folders of the stages; the last is named after its variant."""
USES = ("eval", "chat")
"""Stages that train nothing, in the order in which they run."""


@dataclass(kw_only=True)
class LaunchConfig(Settings):
    """Processes, threads and timeouts."""

    ranks: Count = 1
    """Processes on this machine; above 1 they are started from this one. Ignored when torchrun started us."""
    threads: Natural = 0
    """CPU threads of each rank; 0 shares the cores between the ranks."""
    bind_cores: bool | None = None
    """Keep each rank to cores of its own, on the NUMA node of its GPU (DeepSpeed: --bind_cores_to_rank). null does so
    where every rank of a machine gets at least two, and nobody has bound it before."""
    warn_after_s: Positive = 60.0
    """Seconds for which the others wait for a rank before it is named. It may be at work: nothing else happens."""
    timeout_s: Positive = 1800.0
    """Seconds for which they wait before the run ends; raise it where one rank alone does something for longer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = f"timeout_s={self.timeout_s}: expected a number of seconds from launch.warn_after_s"
        require(self.warn_after_s <= self.timeout_s, f"{limits}={self.warn_after_s} on.")


@dataclass(kw_only=True)
class CheckpointConfig(Settings):
    """When a stage saves itself, and what is kept. A killed run goes on from its last checkpoint.

    They are for runs that do not end: a finished stage removes them. There is never less than the newest one on the
    disk, so there must be room for one more than are kept.
    """

    every: NonNegative = 0.2
    """Steps (PPO: iterations) between two checkpoints; below 1, that share of the stage's, rounded up; 0: none."""
    keep: Count = 1
    """Newest checkpoints that are kept."""
    best: bool = True
    """Keep the one with the best evaluation too; the stage ends with the models of it in `best/`, beside the last."""
    asynchronous: bool = True
    """Write while training goes on; training waits for a copy in host memory only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_steps(self.every, "every")

    def interval_of(self, total_steps: int) -> int:
        """Steps between two checkpoints of a stage of `total_steps`; 0 means none in between."""
        return steps_of_setting(self.every, total_steps)


@dataclass(kw_only=True)
class MemoryConfig(Settings):
    """Memory and disk that a run may use; null takes what the machine has free."""

    device_gb: Positive | None = None
    """GB (1e9 bytes) of each device."""
    host_gb: Positive | None = None
    """GB of this machine's memory, for all its ranks together."""
    disk_gb: Positive | None = None
    """GB below `engine.nvme_path` and `output_dir`."""
    enforce: bool = True
    """Refuse a run that does not fit; false starts it all the same."""


@dataclass(kw_only=True)
class RunConfig(Settings):
    """A whole run."""

    name: str
    """Name of the run: its output folder and its W&B group."""
    output_dir: str
    """Folder for all output (the README shows the tree)."""
    seed: Seed = 0
    """Seed of every stage that does not set its own."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes, threads and timeouts."""
    model: ModelConfig
    """The pretrained model."""
    engine: EngineConfig
    """The engine of every stage."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data of all stages."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Logging, W&B and the report."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When a stage saves itself, and what is kept."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Memory and disk that the run may use."""
    plan: bool = False
    """Print the memory plan and stop; no weights are loaded."""
    sft: SFTConfig | None = None
    """First stage, or null."""
    reward: RewardConfig | None = None
    """Second stage, or null."""
    dpo: DPOConfig | None = None
    """It replaces the second and the third stage; or null."""
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
        require(
            self.ppo is None or not self.ppo.ptx.coef or bool(self.data.ptx.train),
            "ppo.ptx.coef above 0 adds language modelling to the actor's loss, but data.ptx.train is empty; expected "
            "texts or demonstrations, as in 'data.ptx.train=[FILE]'. Name some, or set ppo.ptx.coef=0.",
        )

    def title(self, stage: str) -> str:
        """Name of a stage in folders, tables and hints; PPO's is named after its variant."""
        return self.ppo.title if stage == "ppo" and self.ppo is not None else stage

    def folder(self, stage: str) -> str:
        """Output folder of a stage."""
        return f"{self.output_dir}/{self.title(stage)}"

    def stage_of(self, folder: str) -> str | None:
        """The stage of this run that writes a folder of this name; a run without PPO leaves its name open."""
        if folder in POLICIES:
            return "ppo" if self.ppo is None or self.ppo.title == folder else None
        return folder if folder in STAGES else None

    def stage_config(self, stage: str) -> StageConfig:
        """The settings of a selected stage."""
        config = getattr(self, stage)
        assert isinstance(config, StageConfig), f"{stage} is not selected"
        return config

    def training_config(self, stage: str) -> TrainingConfig:
        """The settings of a selected stage that trains."""
        config = getattr(self, stage)
        assert isinstance(config, TrainingConfig), f"{stage} is not selected, or does not train"
        return config

    def supervised_config(self, stage: str) -> SupervisedConfig:
        """The settings of a selected stage that learns from examples."""
        config = getattr(self, stage)
        assert isinstance(config, SupervisedConfig), f"{stage} is not selected, or does not learn from examples"
        return config

    @property
    def stages(self) -> list[str]:
        """Names of the selected stages, in the order in which they run."""
        return [stage for stage in STAGES if getattr(self, stage) is not None]

    @property
    def uses(self) -> list[str]:
        """Names of what is done with the models afterwards, in that order."""
        return [use for use in USES if getattr(self, use) is not None]
