"""Settings of PPO and its variants without a critic: models, rollouts, batches and optimizers.

See also: `objective_config.py`, which has the KL penalty, scores, advantages and losses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from rlhf.config.bounds import (
    Bounds,
    Count,
    Natural,
    NonNegative,
    Positive,
    Settings,
    ShareAboveZero,
    divisible,
    require,
)
from rlhf.config.engine_config import EngineConfig
from rlhf.config.objective_config import ObjectiveSettings
from rlhf.config.reward_config import RewardCombination, RewardSettings
from rlhf.config.stage_configs import BestMetric, OptimizerConfig, SamplingConfig, TrainingConfig, inherited


class Variant(StrEnum):
    """A published algorithm, which is a set of values for the settings of this stage (`conf/stage/`)."""

    ppo = "ppo"
    grpo = "grpo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"
    rloo = "rloo"
    gspo = "gspo"
    cispo = "cispo"
    reinforce_pp = "reinforce_pp"


POLICIES = tuple(str(variant) for variant in Variant)
"""Names of the PPO stage, by its variant."""


@dataclass(kw_only=True)
class PtxConfig(Settings):
    """Language modelling in the actor's loss (Ouyang et al. 2022, eq. 2; DeepSpeed-Chat's unsupervised training)."""

    coef: NonNegative = 0.0
    """Added to the actor's loss: this times the mean loss of a token of text (InstructGPT: 27.8); 0 reads no text."""
    batch_size: Count = "${ppo.minibatch_size}"  # type: ignore[assignment]
    """Sequences of text in one optimizer step, over all ranks; `ppo.micro_batch_size` of them at once."""
    max_tokens: Annotated[int, Bounds(2)] | None = None
    """Longer texts are cut into pieces, longer demonstrations dropped; null: PPO's longest prompt and response."""


@dataclass(kw_only=True)
class PPOConfig(RewardSettings, ObjectiveSettings, TrainingConfig):
    """Proximal policy optimisation of the actor against reward models and functions."""

    batch_setting = "minibatch_size"
    rows = "prompts"
    best_metric = BestMetric("eval/score", 1)

    variant: Variant = Variant.ppo
    """Name of the algorithm in folders, tables and hints; set by `stage=`, and changes nothing else."""
    actor: str = "${output_dir}/sft/model"
    """Model from which the policy starts."""
    reference: str | None = None
    """Model from which KL is measured; null is the initial actor (with LoRA: its adapters switched off)."""
    reference_update_every: Natural = 0
    """Iterations after which the reference moves towards the actor, so that KL is measured from there (TRL's
    `ref_model_sync_steps`); 0 never. Checkpoints hold it; it is not exported."""
    reference_update_mix: ShareAboveZero = 0.6
    """Share of the actor in the new reference (TRL's `ref_model_mixup_alpha`); 1 copies the actor."""
    reward: str = "${output_dir}/reward/model"
    """Reward model, if it is the only source."""
    rewards: list[Any] = field(default_factory=lambda: ["${ppo.reward}"])
    """Sources of scores instead: models' paths and functions (`file.py:function`), or mappings with `source`, `name`,
    `weight`, `normalize` and `clamp`."""
    reward_combination: RewardCombination = RewardCombination.sum
    """sum: the weighted sum; normalized: of scores that are first normalised among the responses to a prompt (GDPO)."""
    critic: str | None = None
    """Model from which the critic starts; null is the first reward model, or without one the actor with a new head."""
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
    generation_backend: str | None = None
    """A class that generates responses in place of the engine, as `file.py:Class` or `module:Class`; see
    docs/generation.md."""
    critic_engine: EngineConfig = field(default_factory=lambda: inherited(EngineConfig, "ppo.engine"))
    """The critic's engine, unless overridden the stage's; `engine` is the actor's."""
    reference_engine: EngineConfig = field(default_factory=lambda: inherited(EngineConfig, "ppo.engine"))
    """The reference's."""
    reward_engine: EngineConfig = field(default_factory=lambda: inherited(EngineConfig, "ppo.engine"))
    """The reward model's."""
    ptx: PtxConfig = field(default_factory=PtxConfig)
    """Language modelling beside the policy loss, so that the actor forgets less."""
    reuse_frozen_layers: bool = True
    """Compute the layers below the first one that learns (`lora.top_layers`) once for a rollout, instead of in every
    pass, and keep what they give in host memory; the same numbers up to rounding."""
    target_kl: Positive | None = None
    """Ends an iteration's updates once the approximate KL to the sampling policy exceeds it; null never."""
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
    def ptx_tokens(self) -> int:
        """The longest sequence of `data.ptx`."""
        return self.ptx.max_tokens or self.max_prompt_tokens + self.max_response_tokens

    def longest_sequence(self, role: str) -> tuple[str, ...]:
        """The longest prompt with the longest response; for the actor the longest text, where that is longer."""
        names = super().longest_sequence(role)
        reads = self.ptx.coef > 0 and role == "actor"
        return ("ptx.max_tokens",) if reads and self.ptx_tokens > sum(getattr(self, name) for name in names) else names

    def micro_batches(self, optimizer: str | None, *, ranks: int) -> int:
        """Those of a minibatch, and for the actor those of text."""
        reads = self.ptx.coef > 0 and optimizer == "actor_optimizer"
        at_once = self.micro_batch_limit.rows_of(self.ptx_tokens)
        text = -(-self.ptx.batch_size // (ranks * at_once)) if reads else 0
        return super().micro_batches(optimizer, ranks=ranks) + text

    @property
    def micro_batch_settings(self) -> tuple[str, ...]:
        """That of updates, and that of rollouts."""
        return (*super().micro_batch_settings, "rollout_micro_batch_size")

    @property
    def longest_row(self) -> int:
        """The longest prompt with the longest response, or the longest text, where there are texts."""
        return max(super().longest_row, self.ptx_tokens if self.ptx.coef else 0)

    @property
    def title(self) -> str:
        """Name of the stage in folders, tables and hints."""
        return str(self.variant)

    def tokens_held(self, rollouts: int, *, ranks: int, trains: bool) -> int:
        """Most tokens whose sequences one rank holds: its part of the rollouts, and what it trains on of others'."""
        arrived = self.minibatch_size if trains and ranks > 1 else 0
        return -(-(rollouts * self.rollout_size + arrived) // ranks) * (
            self.max_prompt_tokens + self.max_response_tokens
        )

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
        require(
            self.critic_warmup < self.iterations and (self.has_critic or not self.critic_warmup),
            f"ppo.critic_warmup={self.critic_warmup}: expected fewer than ppo.iterations={self.iterations}, and 0 "
            f"without a critic (ppo.advantage={self.advantage}).",
        )
        require(
            not self.compares_groups or self.samples_per_prompt > 1,
            f"ppo.advantage={self.advantage} needs several responses to a prompt: ppo.samples_per_prompt above 1.",
        )
        every = f"ppo.reference_update_every={self.reference_update_every}"
        require(
            not self.reference_update_every or self.lora.rank == 0,
            f"{every}: with adapters (ppo.lora.rank={self.lora.rank}) the actor shares its weights with the reference, "
            "which is the actor without them, and cannot move it; expected 0, or ppo.lora.rank=0.",
        )
        require(
            not self.reference_update_every or self.reference_model is not None,
            f"{every}: there is no reference (ppo.kl.coef=0 and ppo.reference=null); expected 0, or one of them set.",
        )
        kl = self.kl
        require(
            kl.target == 0 or (kl.coef > 0 and kl.horizon > 0.2 * self.rollout_size),
            f"ppo.kl.target={kl.target} adapts the coefficient: expected ppo.kl.coef={kl.coef} above 0 and "
            f"ppo.kl.horizon={kl.horizon} above a fifth of ppo.rollout_size={self.rollout_size}.",
        )
