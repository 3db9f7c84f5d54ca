"""The settings of the training stages, and what all stages have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, ClassVar, NamedTuple, TypeVar

from rlhf.config.bounds import (
    Bounds,
    Count,
    Natural,
    NonNegative,
    Positive,
    Seed,
    Settings,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    divisible,
    require,
)
from rlhf.config.engine_config import EngineConfig
from rlhf.config.model_config import LoraConfig
from rlhf.config.optimizer_config import OptimizerConfig


class KLKind(StrEnum):
    """Estimator of the KL divergence (Schulman, "Approximating KL Divergence")."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class MissingEosMode(StrEnum):
    """What the penalty does to the score of a response that never ends."""

    set = "set"
    subtract = "subtract"


class AdvantageKind(StrEnum):
    """Where advantages come from: a critic (gae), or the other responses to the same prompt."""

    gae = "gae"
    grpo = "grpo"
    rloo = "rloo"
    dr_grpo = "dr_grpo"


POLICIES = ("ppo", "grpo", "rloo", "dr_grpo")
"""What the third stage is called, after its advantages: ppo is gae."""

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
    row_unit: ClassVar[str] = "sequences"
    """What batch sizes count."""
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

    best_metric = BestMetric("eval/loss", -1)

    init_from: str = "${model.path}"
    """Model that is fine-tuned."""
    response_only: bool = True
    """Learn the responses only; false learns the prompts too."""


@dataclass(kw_only=True)
class RewardConfig(SupervisedConfig):
    """Reward modelling on preferences."""

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
    """How responses are drawn."""

    temperature: NonNegative = 1.0
    """Divides the logits, in sampling and in every log-probability; 0 would be greedy, with which PPO cannot learn."""
    top_k: Natural = 0
    """Draw from this many most likely tokens; 0 from all."""
    top_p: ShareAboveZero = 1.0
    """Draw from the smallest set of tokens with this much probability."""


@dataclass(kw_only=True)
class KLConfig(Settings):
    """The penalty for leaving the reference: in the reward, or for grpo and dr_grpo in the loss (as k3)."""

    kind: KLKind = KLKind.k1
    """Estimator in the reward."""
    coef: NonNegative = 0.05
    """Reward lost per nat; where an adaptive one starts. 0 loads no reference, unless `ppo.reference` names one."""
    target: NonNegative = 0.0
    """KL per sequence that an adaptive coefficient steers to (Ziegler et al. 2019); 0 keeps it fixed."""
    horizon: Count = 10_000
    """Sequences over which the adaptive coefficient reacts."""


@dataclass(kw_only=True)
class ScoreConfig(Settings):
    """What happens to the reward model's scalar before it becomes a reward."""

    normalize: bool = True
    """Subtract the held-out mean and divide by the standard deviation that the reward stage stored."""
    clamp: NonNegative = 5.0
    """Limit of a normalised score, both ways; 0 leaves it alone. Scores that are not normalised are never clamped."""
    missing_eos_mode: MissingEosMode = MissingEosMode.subtract
    """Whether the penalty replaces the score or is subtracted from it."""
    missing_eos_penalty: NonNegative = 1.0
    """Penalty for a response that never ends: `set` scores it minus this."""


@dataclass(kw_only=True)
class PPOConfig(TrainingConfig):
    """Proximal policy optimisation of the actor against the reward model."""

    batch_setting = "minibatch_size"
    micro_batch_settings = ("micro_batch_size", "rollout_micro_batch_size")
    best_metric = BestMetric("eval/score", 1)

    actor: str = "${output_dir}/sft/model"
    """Where the policy starts."""
    reference: str | None = None
    """What KL is measured from; null is the actor as it starts (with LoRA: its adapters switched off)."""
    reward: str = "${output_dir}/reward/model"
    """Reward model."""
    critic: str | None = None
    """Where the value function starts; null is the reward model."""
    iterations: Count
    """Rollout batches, each followed by `epochs` of updates."""
    rollout_size: Count
    """Sequences in one rollout batch, over all ranks."""
    samples_per_prompt: Count = 1
    """Responses drawn to each prompt; the batch holds rollout_size / samples_per_prompt prompts."""
    rollout_micro_batch_size: Count
    """Sequences that one rank generates and scores at once."""
    epochs: Count = 4
    """Passes over a rollout batch."""
    minibatch_size: Count
    """Sequences in one optimizer step, over all ranks."""
    actor_optimizer: OptimizerConfig
    """Of the policy."""
    critic_optimizer: OptimizerConfig
    """Of the value function."""
    critic_warmup: Natural = 0
    """First iterations in which only the critic learns."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are drawn."""
    critic_engine: EngineConfig = field(default_factory=lambda: inherited(EngineConfig, "ppo.engine"))
    """The critic's engine, unless overridden the stage's; `engine` is the actor's."""
    reference_engine: EngineConfig = field(default_factory=lambda: inherited(EngineConfig, "ppo.engine"))
    """The reference's."""
    reward_engine: EngineConfig = field(default_factory=lambda: inherited(EngineConfig, "ppo.engine"))
    """The reward model's."""
    kl: KLConfig = field(default_factory=KLConfig)
    """The penalty for leaving the reference."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """From the reward model's scalar to the reward."""
    advantage: AdvantageKind = AdvantageKind.gae
    """gae trains a critic; grpo, rloo and dr_grpo compare the responses to one prompt."""
    advantage_eps: Positive = 1e-4
    """Added to the standard deviation of a group's scores by which grpo divides; larger mutes groups that agree."""
    gamma: ShareAboveZero = 1.0
    """Discount per token."""
    lam: Share = 0.95
    """Lambda of generalised advantage estimation."""
    whiten: bool = True
    """Advantages of gae to mean 0 and variance 1 over the batch of all ranks; those of groups stay as they are."""
    clip_range: Annotated[float, Bounds(0, 1, above=True, below=True)] = 0.2
    """The ratio is clipped to 1 - clip_range ... 1 + clip_range."""
    clip_range_high: Positive | None = None
    """Upper clip, when it differs from the lower."""
    dual_clip: Annotated[float, Bounds(1, above=True)] | None = None
    """Lower bound for negative advantages, a ratio above 1 (Ye et al. 2020); null is off."""
    value_clip_range: Positive | None = 0.2
    """New values stay within this distance of the old ones; null does not clip them."""
    entropy_coef: NonNegative = 0.0
    """Bonus per nat of entropy."""
    target_kl: Positive | None = None
    """Ends the epochs of an iteration when the approximate KL to the sampling policy exceeds it; null never."""
    eval_prompts: Natural = 64
    """Held-out prompts answered before and after; 0 evaluates nothing."""
    eval_every: Natural = 0
    """Iterations between evaluations; 0 evaluates at the start and the end only."""

    @property
    def reference_model(self) -> str | None:
        """The model that is loaded as the reference; None where the actor without its adapters is one, or none is."""
        unneeded = self.lora.rank > 0 or self.kl.coef == 0
        return self.actor if self.reference is None and not unneeded else self.reference

    @property
    def measures_kl(self) -> bool:
        """Whether there is a reference to measure KL from."""
        return self.reference_model is not None or self.lora.rank > 0

    @property
    def title(self) -> str:
        """What the stage is called in folders, tables and hints."""
        return "ppo" if self.advantage is AdvantageKind.gae else str(self.advantage)

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer steps that follow a rollout batch."""
        return self.epochs * (self.rollout_size // self.minibatch_size)

    def optimizer_steps(self, optimizer: str, *, num_rows: int) -> int:
        """The actor waits while the critic warms up; how many prompts there are makes no difference."""
        return self.actor_steps if optimizer == "actor_optimizer" else self.critic_steps

    @property
    def critic_steps(self) -> int:
        """Optimizer steps of the critic in the whole stage."""
        return self.iterations * self.updates_per_iteration

    @property
    def actor_steps(self) -> int:
        """Optimizer steps of the actor, which waits while the critic warms up."""
        return (self.iterations - self.critic_warmup) * self.updates_per_iteration

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sampling.temperature > 0, "ppo.sampling.temperature=0: PPO explores; expected a number above 0.")
        require(self.lora.dropout == 0, f"ppo.lora.dropout={self.lora.dropout}: PPO runs without dropout; expected 0.")
        divisible(self.rollout_size, by=self.samples_per_prompt, names="ppo.rollout_size by ppo.samples_per_prompt")
        divisible(self.rollout_size, by=self.minibatch_size, names="ppo.rollout_size by ppo.minibatch_size")
        self._check_kl()
        grouped = self.advantage is not AdvantageKind.gae
        require(
            self.critic_warmup < self.iterations and not (grouped and self.critic_warmup),
            f"ppo.critic_warmup={self.critic_warmup}: expected fewer than ppo.iterations={self.iterations}, and 0 "
            f"without a critic (ppo.advantage={self.advantage}).",
        )
        require(
            not grouped or self.samples_per_prompt > 1,
            f"ppo.advantage={self.advantage} needs several responses to a prompt: ppo.samples_per_prompt above 1.",
        )

    def _check_kl(self) -> None:
        kl = self.kl
        require(
            kl.target == 0 or (kl.coef > 0 and kl.horizon > 0.2 * self.rollout_size),
            f"ppo.kl.target={kl.target} adapts the coefficient: expected ppo.kl.coef={kl.coef} above 0 and "
            f"ppo.kl.horizon={kl.horizon} above a fifth of ppo.rollout_size={self.rollout_size}.",
        )
