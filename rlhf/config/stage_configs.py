"""Settings that training stages share (adapters, AdamW and schedule), and those of SFT and reward modelling."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, TypeVar

from rlhf.config.bounds import (
    Count,
    MicroBatchLimit,
    Natural,
    NonNegative,
    Positive,
    Seed,
    Settings,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    require,
    require_steps,
    steps_of_setting,
)
from rlhf.config.engine_config import EngineConfig


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


@dataclass(kw_only=True)
class OptimizerConfig(Settings):
    """AdamW and its schedule."""

    lr: Positive
    """Learning rate after the warm-up."""
    lora_lr: Positive | None = None
    """Learning rate of adapters, for a scalar head that learns beside them at `lr`; scheduled alike. null is `lr`."""
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
    ema_decay: ShareBelowOne = 0.0
    """Decay per step of a moving average of the weights, evaluated as ema/* and exported as NAME_ema; 0 keeps none."""
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

    @property
    def lora_factor(self) -> float:
        """The rate of adapters over `lr`."""
        return 1.0 if self.lora_lr is None else self.lora_lr / self.lr

    def warmup_of(self, total_steps: int) -> int:
        """The warm-up of a stage of `total_steps`, in steps."""
        return steps_of_setting(self.warmup_steps, total_steps)


T = TypeVar("T")


def inherited(cls: type[T], group: str) -> T:
    """A `cls` whose every field is the one of `group` until it is overridden (one reference for all could not be)."""
    return cls(**{name: f"${{{group}.{name}}}" for name in vars(cls)["__dataclass_fields__"]})


class ModelKind(StrEnum):
    """Head of a decoder: logits over the vocabulary, or one number per position."""

    causal_lm = "causal_lm"
    scalar_head = "scalar_head"


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

    def longest_sequence(self, role: str) -> tuple[str, ...]:
        """Names of the settings whose sum is the longest sequence of a role, in tokens; empty where there are none."""
        return ()


@dataclass(kw_only=True)
class TrainingConfig(StageConfig):
    """The settings that every training stage has."""

    batch_setting: ClassVar[str]
    """Name of the setting that holds the sequences of one optimizer step, over all ranks."""
    rows: ClassVar[str]
    """Kind of training data: a key of `READERS` in `data/samples.py`."""
    row_unit: ClassVar[str] = "sequences"
    """Unit of batch sizes."""
    best_metric: ClassVar[BestMetric]
    """Decides which evaluation is the best one."""

    lora: LoraConfig
    """Adapters; rank 0 trains the whole model."""
    micro_batch_size: Count
    """Sequences (reward, DPO: pairs) in one forward and backward of one rank: memory, not results."""
    micro_batch_tokens: Count | None = None
    """Tokens in one of these, padding included: it then has as many sequences of similar length as fit, at most
    `micro_batch_size`, and a longer one is alone. null leaves it to `micro_batch_size`."""
    max_prompt_tokens: Count
    """Longer prompts are dropped, and the run says how many."""
    max_response_tokens: Count
    """Longer responses are dropped in SFT, reward and DPO; in PPO, where generation stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, optimizer in vars(self).items():
            if isinstance(optimizer, OptimizerConfig):
                require(
                    optimizer.lora_lr is None or self.lora.rank > 0,
                    f"{name}.lora_lr={optimizer.lora_lr}: expected null without adapters (lora.rank=0).",
                )
        limit = self.micro_batch_limit
        require(
            limit.tokens is None or limit.rows * self.longest_row > limit.tokens,
            f"micro_batch_tokens={limit.tokens}: micro_batch_size={limit.rows} {self.row_unit} of at most "
            f"{self.longest_row} tokens have no more; expected fewer, null, or a larger micro_batch_size.",
        )

    @property
    def batch_size(self) -> int:
        """Sequences (reward, DPO: pairs) in one optimizer step, over all ranks."""
        size: int = getattr(self, self.batch_setting)
        return size

    @property
    def micro_batch_limit(self) -> MicroBatchLimit:
        """What goes through a model at once."""
        return MicroBatchLimit(self.micro_batch_size, self.micro_batch_tokens)

    @property
    def micro_batch_settings(self) -> tuple[str, ...]:
        """Names of the settings that trade memory for speed and leave results alone."""
        return ("micro_batch_size" if self.micro_batch_tokens is None else "micro_batch_tokens",)

    @property
    def sequences_per_row(self) -> int:
        """Sequences in a row of data."""
        return 2 if self.row_unit == "pairs" else 1

    @property
    def longest_row(self) -> int:
        """Tokens of the longest sequence, or pair of them."""
        return self.sequences_per_row * (self.max_prompt_tokens + self.max_response_tokens)

    def longest_sequence(self, role: str) -> tuple[str, ...]:
        """The longest prompt with the longest response."""
        return ("max_prompt_tokens", "max_response_tokens")

    def micro_batches(self, optimizer: str | None, *, ranks: int) -> int:
        """Micro-batches of a rank in one step of the optimizer of that setting, at most."""
        return -(-self.batch_size // (ranks * self.micro_batch_limit.rows_of(self.longest_row)))

    def optimizer_steps(self, optimizer: str, *, num_rows: int) -> int:
        """Steps that the optimizer of the setting `optimizer` takes in the whole stage, with `num_rows` to train on."""
        raise NotImplementedError


@dataclass(kw_only=True)
class SupervisedConfig(TrainingConfig):
    """The settings of a stage that learns from examples: of SFT, reward modelling and DPO.

    What differs is named here, and the memory plan, the roles and the metrics follow from it.
    """

    batch_setting = "global_batch_size"
    kind: ClassVar[ModelKind]
    """Head of the model that is trained."""
    objective: ClassVar[str]
    """Its loss: a key of `OBJECTIVES` in `rlhf/training/supervised_step.py`."""

    init_from: str
    """Model that training starts from."""

    optimizer: OptimizerConfig
    """AdamW and its schedule."""
    epochs: NonNegative = 1.0
    """Passes over the data, unless `max_steps` is set."""
    max_steps: Natural = 0
    """Optimizer steps; 0 derives them from `epochs`."""
    global_batch_size: Count
    """Sequences (reward, DPO: pairs) in one optimizer step, over all ranks."""
    eval_every: Natural = 0
    """Optimizer steps between evaluations; 0 evaluates at the start and the end only."""
    eval_rows: Natural = 0
    """Held-out rows that are evaluated; 0 takes all."""
    dropout: ShareBelowOne = 0.0
    """Every dropout probability of the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_steps > 0 or self.epochs > 0, f"epochs={self.epochs}: expected a number above 0.")

    @property
    def layers_kept(self) -> int:
        """Layers of the trunk that are used, the first ones; 0 is all."""
        return 0

    def steps(self, num_rows: int) -> int:
        """Optimizer steps: `max_steps` where it is set, else as many as see every row `epochs` times."""
        return self.max_steps or max(1, math.ceil(round(self.epochs * num_rows / self.global_batch_size, 6)))

    def optimizer_steps(self, optimizer: str, *, num_rows: int) -> int:
        """There is one optimizer, and it steps once per training step."""
        return self.steps(num_rows)


@dataclass(kw_only=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on demonstrations."""

    rows = "demonstrations"
    kind = ModelKind.causal_lm
    objective = "next_token"
    best_metric = BestMetric("eval/loss", -1)

    init_from: str = "${model.path}"
    """Model that is fine-tuned."""
    response_only: bool = True
    """Learn the responses only; false learns the prompts too."""


@dataclass(kw_only=True)
class RewardConfig(SupervisedConfig):
    """Reward modelling on preferences."""

    rows = "preferences"
    kind = ModelKind.scalar_head
    objective = "pairwise"
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

    @property
    def layers_kept(self) -> int:
        """As `num_layers` says."""
        return self.num_layers


@dataclass(kw_only=True)
class SamplingConfig(Settings):
    """Sampling of responses."""

    temperature: NonNegative = 1.0
    """Divides the logits, in sampling and in every log-probability; 0 would be greedy, with which PPO cannot learn."""
    top_k: Natural = 0
    """Draw from this many most likely tokens; 0 from all."""
    top_p: ShareAboveZero = 1.0
    """Draw from the smallest set of tokens with this much probability."""
