"""Settings of PPO and its variants without a critic: rollouts, advantages, KL penalty, scores and losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from rlhf.config.bounds import (
    Bounds,
    Count,
    Natural,
    NonNegative,
    Positive,
    Settings,
    Share,
    ShareAboveZero,
    divisible,
    require,
)
from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import BestMetric, OptimizerConfig, SamplingConfig, TrainingConfig, inherited


class KLKind(StrEnum):
    """Estimator of the KL divergence (Schulman, "Approximating KL Divergence")."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class MissingEosMode(StrEnum):
    """Effect of a missing EOS on the score."""

    set = "set"
    subtract = "subtract"


class AdvantageKind(StrEnum):
    """Advantage estimator: with a critic (gae), or by comparison with other responses to the same prompt."""

    gae = "gae"
    grpo = "grpo"
    rloo = "rloo"
    dr_grpo = "dr_grpo"


POLICIES = ("ppo", "grpo", "rloo", "dr_grpo")
"""Names of the third stage by its advantage estimator; ppo is gae."""


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
    """From the reward model's scalar to the score that PPO is paid."""

    normalize: bool = True
    """Subtract the held-out mean and divide by the standard deviation that the reward stage stored."""
    clamp: NonNegative = 5.0
    """Limit of a normalised score, both ways; 0 leaves it alone. Scores that are not normalised are never clamped."""
    missing_eos_mode: MissingEosMode = MissingEosMode.subtract
    """The penalty replaces the score (set) or is subtracted from it."""
    missing_eos_penalty: NonNegative = 1.0
    """Penalty for a response that never ends: `set` scores it minus this."""


@dataclass(kw_only=True)
class PPOConfig(TrainingConfig):
    """Proximal policy optimisation of the actor against the reward model."""

    batch_setting = "minibatch_size"
    micro_batch_settings = ("micro_batch_size", "rollout_micro_batch_size")
    rows = "prompts"
    best_metric = BestMetric("eval/score", 1)

    actor: str = "${output_dir}/sft/model"
    """Model from which the policy starts."""
    reference: str | None = None
    """Model from which KL is measured; null is the initial actor (with LoRA: its adapters switched off)."""
    reward: str = "${output_dir}/reward/model"
    """Reward model."""
    critic: str | None = None
    """Model from which the critic starts; null is the reward model."""
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
    """AdamW of the actor."""
    critic_optimizer: OptimizerConfig
    """AdamW of the critic."""
    critic_warmup: Natural = 0
    """First iterations in which only the critic learns."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of responses."""
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
        """Name of the stage in folders, tables and hints."""
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
