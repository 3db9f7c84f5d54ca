"""Settings that all stages share, and those of SFT and reward modelling."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeVar

from rlhf.config.bounds import (
    Count,
    Natural,
    NonNegative,
    Seed,
    Settings,
    ShareAboveZero,
    ShareBelowOne,
    require,
)
from rlhf.config.engine_config import EngineConfig
from rlhf.config.model_config import LoraConfig
from rlhf.config.optimizer_config import OptimizerConfig

T = TypeVar("T")


def inherited(cls: type[T], group: str) -> T:
    """A `cls` whose every field is the one of `group` until it is overridden (one reference for all could not be)."""
    return cls(**{name: f"${{{group}.{name}}}" for name in vars(cls)["__dataclass_fields__"]})


class BestMetric(NamedTuple):
    """The held-out metric by which one evaluation is better than another."""

    metric: str
    sign: int  # 1 where more is better, -1 where less is


@dataclass(kw_only=True)
class StageConfig(Settings):
    """The settings that every stage has, evaluation and chat included."""

    selected: bool = False
    """Set by the stage's own YAML: whether this run includes the stage."""
    engine: EngineConfig = field(default_factory=lambda: inherited(EngineConfig, "engine"))
    """The run's engine, unless overridden for this stage."""
    seed: Seed = "${seed}"  # type: ignore[assignment]
    """Seed of everything that the stage draws: data order, new weights, sampling."""

    def longest_sequence(self) -> tuple[str, ...]:
        """Names of the settings whose sum is the longest sequence, in tokens; empty where nothing bounds it."""
        return ()


@dataclass(kw_only=True)
class TrainingConfig(StageConfig):
    """The settings that every training stage has."""

    batch_setting: ClassVar[str]
    """Name of the setting that holds the sequences of one optimizer step, over all ranks."""
    micro_batch_settings: ClassVar[tuple[str, ...]] = ("micro_batch_size",)
    """Names of the settings that trade memory for speed and leave results alone."""
    rows: ClassVar[str]
    """Kind of training data: a key of `READERS` in `data/samples.py`."""
    row_unit: ClassVar[str] = "sequences"
    """Unit of batch sizes."""
    best_metric: ClassVar[BestMetric]
    """Decides which evaluation is the best one."""

    lora: LoraConfig
    """Adapters; rank 0 trains the whole model."""
    micro_batch_size: Count
    """Sequences (reward: pairs) in one forward and backward of one rank: memory, not results."""
    max_prompt_tokens: Count
    """Longer prompts are dropped, and the run says how many."""
    max_response_tokens: Count
    """Longer responses are dropped in SFT and reward; in PPO, where generation stops."""

    @property
    def batch_size(self) -> int:
        """Sequences (reward: pairs) in one optimizer step, over all ranks."""
        size: int = getattr(self, self.batch_setting)
        return size

    def longest_sequence(self) -> tuple[str, ...]:
        """The longest prompt with the longest response."""
        return ("max_prompt_tokens", "max_response_tokens")

    def optimizer_steps(self, optimizer: str, *, num_rows: int) -> int:
        """Steps that the optimizer of the setting `optimizer` takes in the whole stage, with `num_rows` to train on."""
        raise NotImplementedError


@dataclass(kw_only=True)
class SupervisedConfig(TrainingConfig):
    """The settings that SFT and reward training share."""

    batch_setting = "global_batch_size"

    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    epochs: NonNegative = 1.0
    """Passes over the data, unless `max_steps` is set."""
    max_steps: Natural = 0
    """Optimizer steps; 0 derives them from `epochs`."""
    global_batch_size: Count
    """Sequences (reward: pairs) in one optimizer step, over all ranks."""
    eval_every: Natural = 0
    """Optimizer steps between evaluations; 0 evaluates at the start and the end only."""
    eval_rows: Natural = 0
    """Held-out rows that are evaluated; 0 takes all."""
    dropout: ShareBelowOne = 0.0
    """Every dropout probability of the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_steps > 0 or self.epochs > 0, f"epochs={self.epochs}: expected a number above 0.")

    def steps(self, num_rows: int) -> int:
        """Optimizer steps: `max_steps` where it is set, else as many as see every row `epochs` times."""
        return self.max_steps or max(1, math.ceil(round(self.epochs * num_rows / self.global_batch_size, 6)))

    def optimizer_steps(self, optimizer: str, *, num_rows: int) -> int:
        """The one optimizer steps once a step."""
        return self.steps(num_rows)


@dataclass(kw_only=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on demonstrations."""

    rows = "demonstrations"
    best_metric = BestMetric("eval/loss", -1)

    init_from: str = "${model.path}"
    """Model that is fine-tuned."""
    response_only: bool = True
    """Learn the responses only; false learns the prompts too."""


@dataclass(kw_only=True)
class RewardConfig(SupervisedConfig):
    """Reward modelling on preferences."""

    rows = "preferences"
    row_unit = "pairs"
    best_metric = BestMetric("eval/accuracy", 1)

    init_from: str = "${output_dir}/sft/model"
    """Causal language model whose trunk gets a scalar head."""
    num_layers: Natural = 0
    """Keep only the first layers of the trunk; 0 keeps all."""
    center_coef: NonNegative = 0.0
    """Weight of the squared sum of both scores, which keeps scores near zero (Eisenstein et al. 2023)."""
    use_margin: bool = False
    """Require the score difference to exceed the data's `margin` (Touvron et al. 2023)."""


@dataclass(kw_only=True)
class SamplingConfig(Settings):
    """Sampling of responses."""

    temperature: NonNegative = 1.0
    """Divides the logits, in sampling and in every log-probability; 0 would be greedy, with which PPO cannot learn."""
    top_k: Natural = 0
    """Draw from this many most likely tokens; 0 from all."""
    top_p: ShareAboveZero = 1.0
    """Draw from the smallest set of tokens with this much probability."""
