"""The settings that stages share: launch, model, adapters, optimizer, data, tracking, checkpoints, memory.

`conf/` holds the numbers; a field without a default here must be given there. The text under a field says its unit and
consequence. Imports nothing but the standard library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rlhf.config_numbers import Count, Natural, NonNegative, Positive, Seed, Settings, Share, ShareBelowOne


class Schedule(StrEnum):
    """Shape of the learning rate after the warm-up; from `warmup_lr` on DeepSpeed's, warm-up included."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    warmup_lr = "warmup_lr"
    warmup_decay_lr = "warmup_decay_lr"
    warmup_cosine_lr = "warmup_cosine_lr"
    one_cycle = "one_cycle"
    lr_range_test = "lr_range_test"


_OWN_SCHEDULES = (Schedule.constant, Schedule.linear, Schedule.cosine)


class BadRows(StrEnum):
    """What a row that cannot be used does to a run."""

    stop = "stop"
    drop = "drop"


class RewrittenTurns(StrEnum):
    """What becomes of an answer that the chat template writes differently once the conversation goes on."""

    skip = "skip"
    as_generated = "as_generated"


class WandbMode(StrEnum):
    """How W&B is used; auto is online with a key and a reachable server, else offline. It never prompts."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Progress(StrEnum):
    """What the terminal shows; auto is a bar on a terminal and plain lines elsewhere."""

    auto = "auto"
    bar = "bar"
    plain = "plain"
    quiet = "quiet"


class Embedded(StrEnum):
    """Models that the project can make without a model hub."""

    smollm2 = "smollm2"
    tiny = "tiny"


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


def require_steps(value: float, name: str) -> None:
    """Raise ValueError unless `value` can be read by `steps_of_setting`."""
    require(
        value < 1 or float(value).is_integer(),
        f"{name}={value}: expected 0 or more: below 1 a share of the stage's steps, from 1 on a whole number of them.",
    )


def steps_of_setting(value: float, total_steps: int) -> int:
    """The steps that a setting means: from 1 on that many, below 1 that share of `total_steps`, rounded up.

    Rounded up as transformers rounds its warm-up, so that no share but 0 is no step; but what is rounded is the product
    of the decimal numbers that were written: 0.07 of 100 is 7, where the floats make 7.000000000000001 and so 8.
    """
    if value >= 1 or value == 0:
        return int(value)
    return max(1, math.ceil(round(value * total_steps, 6)))


def divisible(total: int, *, by: int, names: str) -> int:
    """`total // by`, or a ValueError that names both settings and the nearest totals that divide."""
    lower, upper = total // by * by, -(-total // by) * by
    near = " or ".join(str(size) for size in dict.fromkeys((lower or upper, upper)))
    require(lower == total, f"{names}: {total} is not a multiple of {by}; use {near}.")
    return total // by


def accumulation(global_batch_size: int, *, micro_batch_size: int, ranks: int, name: str) -> int:
    """Micro-batches per optimizer step and rank; raises ValueError when the sizes do not divide."""
    names = f"{name} by ranks x micro_batch_size ({ranks} x {micro_batch_size})"
    return divisible(global_batch_size, by=ranks * micro_batch_size, names=names)


@dataclass(kw_only=True)
class LaunchConfig(Settings):
    """How a run is started."""

    ranks: Count = 1
    """Processes on this machine; above 1 they are started from this one. Ignored when torchrun started us."""
    threads: Natural = 0
    """CPU threads of each rank; 0 shares the cores between the ranks."""
    warn_after_s: Positive = 60.0
    """Seconds for which the others wait for a rank before it is named. It may be at work: nothing else happens."""
    timeout_s: Positive = 1800.0
    """Seconds for which they wait before the run ends; raise it where one rank alone does something for longer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = f"timeout_s={self.timeout_s}: expected a number of seconds from launch.warn_after_s"
        require(self.warn_after_s <= self.timeout_s, f"{limits}={self.warn_after_s} on.")


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
    """Token to pad with; null finds one that never occurs in a text (see `rlhf/text.py`)."""


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


@dataclass(kw_only=True)
class OptimizerConfig(Settings):
    """AdamW and its schedule."""

    lr: Positive
    """Learning rate after the warm-up."""
    betas: list[ShareBelowOne] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the two moments."""
    eps: NonNegative = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay; never on biases, norms and other vectors."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them alone."""
    schedule: Schedule = Schedule.linear
    """Shape after the warm-up, over the whole stage."""
    warmup_steps: NonNegative = 0.0
    """Optimizer steps in which the learning rate climbs linearly; below 1, that share of the stage, rounded up."""
    min_ratio: Share = 0.0
    """The schedule ends at this fraction of `lr`."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """For one of DeepSpeed's shapes: its parameters by DeepSpeed's names, where they differ from its defaults; what is
    left out of warmup_num_steps and total_num_steps is `warmup_steps` and the stage's own length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_steps(self.warmup_steps, "warmup_steps")
        numbers = [value for value in self.schedule_options.values() if isinstance(value, float)]
        finite = all(map(math.isfinite, numbers))
        require(finite, f"schedule_options={self.schedule_options}: expected finite numbers.")
        require(len(self.betas) == 2, f"betas={self.betas}: expected two numbers.")
        require(
            self.schedule not in _OWN_SCHEDULES or not self.schedule_options,
            f"schedule_options={self.schedule_options}: schedule={self.schedule} has none.",
        )

    def warmup_of(self, total_steps: int) -> int:
        """The warm-up of a stage of `total_steps`, in steps."""
        return steps_of_setting(self.warmup_steps, total_steps)


@dataclass(kw_only=True)
class StageDataConfig(Settings):
    """The data sets of one stage."""

    train: list[Any] = field(default_factory=list)
    """Paths or hub ids, or mappings with the keys of `SourceConfig`; several are blended."""
    eval: list[Any] = field(default_factory=list)
    """Held-out data; empty takes `eval_fraction` of the training rows away."""
    eval_fraction: ShareBelowOne = 0.05
    """Share of the training rows held out when `eval` is empty."""
    bad_rows: BadRows = BadRows.stop
    """What a row that cannot be used (empty, chosen equal to rejected, ...) does: stop the run, or be dropped."""
    rewritten_turns: RewrittenTurns = RewrittenTurns.skip
    """Earlier answers of demonstrations that the template rewrites, as Qwen3 leaves out their reasoning. They are not
    learnt, or (as_generated) each gives a sequence more, which ends with it: nothing is lost, at their tokens' cost."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train = [SourceConfig.parse(source) for source in self.train]
        self.eval = [SourceConfig.parse(source) for source in self.eval]


@dataclass(kw_only=True)
class SourceConfig(Settings):
    """One data set: a JSON, JSONL, CSV or Parquet file, a `save_to_disk` folder, or a hub id."""

    path: str
    """File, folder or hub id."""
    name: str | None = None
    """Configuration of a hub data set, or of a clone of one."""
    split: str = "train"
    """Split of a folder or hub data set, in full: `train_sft` where that is what it is called."""
    weight: NonNegative = 1.0
    """Share of its rows that are used: 0.5 takes half of them, 2 takes each twice."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column name -> the data set's, where they differ."""

    @classmethod
    def parse(cls, source: Any) -> SourceConfig:
        """A source written as a path or as a mapping."""
        if isinstance(source, SourceConfig):
            return source
        if isinstance(source, str):
            return cls(path=source)
        require(isinstance(source, dict), f"data source {source}: expected a path, or a mapping with `path`.")
        unknown = set(source) - set(cls.__dataclass_fields__)
        require(
            not unknown, f"data source {source}: unknown {sorted(unknown)}; expected {[*cls.__dataclass_fields__]}."
        )
        require("path" in source, f"data source {source}: `path` is missing.")
        return cls(**source)


@dataclass(kw_only=True)
class DataConfig(Settings):
    """What the stages learn from."""

    sft: StageDataConfig = field(default_factory=StageDataConfig)
    """Demonstrations: `messages`, or `prompt` and `completion`, or `text`."""
    reward: StageDataConfig = field(default_factory=StageDataConfig)
    """Preferences: `chosen`, `rejected`, perhaps `prompt` and `margin`."""
    ppo: StageDataConfig = field(default_factory=StageDataConfig)
    """Prompts: `prompt`."""
    stage_split: list[NonNegative] = field(default_factory=list)
    """DeepSpeed-Chat's split of the same rows between the three stages, such as [2, 4, 4]; empty: all rows for each."""
    split_seed: Seed = 1234
    """Seed of `stage_split`, of held-out rows and of fractional weights."""
    cache_dir: str | None = None
    """Folder for tokenised data, found again by content; null tokenises every time."""
    gold: dict[str, str] = field(default_factory=dict)
    """Metrics that no model was trained on: name -> `module:function`, called with prompts and responses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for stage, sources in (("reward", self.reward), ("ppo", self.ppo)):
            unused = sources.rewritten_turns is RewrittenTurns.skip
            require(unused, f"data.{stage}.rewritten_turns: only demonstrations have it; set data.sft.rewritten_turns.")
        shares = self.stage_split
        require(len(shares) in (0, 3), f"data.stage_split={shares}: expected three numbers (sft, reward, ppo) or none.")
        require(not shares or sum(shares) > 0, f"data.stage_split={shares}: expected a positive sum.")


@dataclass(kw_only=True)
class TrackingConfig(Settings):
    """What is shown and recorded."""

    wandb: WandbMode = WandbMode.auto
    """How W&B is used."""
    project: str = "rlhf-pipeline"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null is the key's default."""
    progress: Progress = Progress.auto
    """What the terminal shows."""
    log_every: Count = 1
    """Optimizer steps (in PPO: iterations) between two rows of `metrics.jsonl`."""
    report: bool = True
    """Write `report.html` after each stage and of the whole run: some seconds each."""
    histograms_every: Natural = 0
    """Steps (in PPO: iterations, over all their updates) between histograms of gradients, before clipping, and weights
    in W&B; 0 sends none."""


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
    """What a run may use, for the plan; null takes what the machine has free."""

    device_gb: Positive | None = None
    """GB (1e9 bytes) of each device."""
    host_gb: Positive | None = None
    """GB of this machine's memory, for all its ranks together."""
    disk_gb: Positive | None = None
    """GB below `engine.nvme_path` and `output_dir`."""
    enforce: bool = True
    """Refuse a run that does not fit; false starts it all the same."""
