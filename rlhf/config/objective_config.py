"""Settings of what PPO optimises: KL penalty, scores, advantages, the losses and their clips.

See also: `ppo_config.py`, which has the models, the rollouts and the batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from rlhf.config.bounds import Bounds, Count, Natural, NonNegative, Positive, Settings, Share, ShareAboveZero, require


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
    """Advantage estimator: with a critic (gae), against the other responses to the prompt, or the bare return."""

    gae = "gae"
    grpo = "grpo"
    rloo = "rloo"
    reinforce_pp = "reinforce_pp"


class AdvantageScale(StrEnum):
    """What advantages are divided by."""

    whiten = "whiten"
    group = "group"
    batch = "batch"
    none = "none"


class LossAggregation(StrEnum):
    """What the actor's loss is a mean of."""

    token_mean = "token_mean"  # noqa: S105 - not a secret
    sequence_mean = "sequence_mean"
    constant = "constant"


class PolicyLossKind(StrEnum):
    """The actor's loss: PPO's clipped surrogate, or REINFORCE with a clipped weight."""

    clip = "clip"
    cispo = "cispo"


class RatioLevel(StrEnum):
    """Whether the ratio of new to old probability is one of tokens or of whole responses."""

    token = "token"  # noqa: S105 - not a secret
    sequence = "sequence"


class MismatchCorrection(StrEnum):
    """Importance weights for the difference between the paths that generate and that train."""

    auto = "auto"
    none = "none"
    token_truncate = "token_truncate"  # noqa: S105 - not a secret
    token_mask = "token_mask"  # noqa: S105 - not a secret
    sequence_mask = "sequence_mask"


@dataclass(kw_only=True)
class KLConfig(Settings):
    """The penalty for leaving the reference, in the reward or in the loss."""

    kind: KLKind = KLKind.k1
    """Estimator; in the loss, k1 has a gradient that is noise, k2 that of the KL."""
    in_loss: bool = False
    """Add the KL to the actor's loss, as GRPO does, instead of taking it from the reward."""
    coef: NonNegative = 0.05
    """Price of a nat; where an adaptive one starts. 0 loads no reference, unless `ppo.reference` names one."""
    target: NonNegative = 0.0
    """KL per sequence that an adaptive coefficient steers to (Ziegler et al. 2019); 0 keeps it fixed."""
    horizon: Count = 10_000
    """Sequences over which the adaptive coefficient reacts."""


@dataclass(kw_only=True)
class ScoreConfig(Settings):
    """From the scores of reward sources to the score that PPO is paid."""

    normalize: bool = True
    """Subtract the held-out mean of a reward model and divide by the standard deviation that the reward stage stored;
    the scores of functions, often 0 and 1, stay as they are unless their own `normalize` says otherwise."""
    clamp: NonNegative = 5.0
    """Limit of a normalised score, both ways; 0 leaves it alone. Scores that are not normalised are never clamped."""
    missing_eos_mode: MissingEosMode = MissingEosMode.subtract
    """The penalty replaces the score (set) or is subtracted from it."""
    missing_eos_penalty: NonNegative = 1.0
    """Penalty for a response that never ends: `set` scores it minus this."""
    overlong_share: Share = 0.0
    """Last part of max_response_tokens over which a penalty for length grows (DAPO); 0 has none."""
    overlong_penalty: NonNegative = 1.0
    """Penalty of a response of max_response_tokens, if `overlong_share` is above 0."""


@dataclass(kw_only=True)
class MismatchConfig(Settings):
    """Correction for tokens that were generated with slightly other probabilities than those that training computes."""

    correction: MismatchCorrection = MismatchCorrection.auto
    """auto: token_truncate where the actor computes in bf16 or fp16, or another one answers
    (`ppo.generation_backend`); else none."""
    high: Positive = 2.0
    """Largest ratio of training to generation probability: truncated to it, or left out beyond it."""
    low: NonNegative = 0.0
    """Smallest ratio that a mask keeps."""

    def kind(self, is_exact: bool) -> MismatchCorrection:
        """The correction where both paths compute alike and in fp32, or not."""
        if self.correction is not MismatchCorrection.auto:
            return self.correction
        return MismatchCorrection.none if is_exact else MismatchCorrection.token_truncate


@dataclass(kw_only=True)
class ObjectiveSettings(Settings):
    """From scores to the losses of actor and critic."""

    kl: KLConfig = field(default_factory=KLConfig)
    """The penalty for leaving the reference."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """How the scores of the sources become the score of a response."""
    advantage: AdvantageKind = AdvantageKind.gae
    """gae trains a critic; grpo (group mean) and rloo (leave one out) compare the responses to a prompt; reinforce_pp
    takes the return of each token."""
    scale_advantages: AdvantageScale = AdvantageScale.whiten
    """whiten: mean 0 and variance 1 over the tokens of the batch; group, batch: divided by the deviation of scores."""
    advantage_eps: Positive = 1e-4
    """Added to the deviation by which group and batch divide; larger mutes groups whose scores nearly agree."""
    gamma: ShareAboveZero = 1.0
    """Discount per token."""
    lam: Share = 0.95
    """Lambda of generalised advantage estimation."""
    policy_loss: PolicyLossKind = PolicyLossKind.clip
    """clip: PPO's surrogate; cispo: the clipped ratio weighs -A log p, and no token loses its gradient."""
    ratio_level: RatioLevel = RatioLevel.token
    """The ratio of new to old probability: of each token, or of a response (geometric mean of its tokens' ratios)."""
    loss_aggregation: LossAggregation = LossAggregation.token_mean
    """Mean over tokens, over the means of sequences, or the sum divided by sequences x max_response_tokens."""
    mask_truncated: bool = False
    """Leave responses that reach max_response_tokens out of the actor's loss; they still count in their group."""
    dynamic_sampling: Natural = 0
    """Most further rollout batches per iteration to replace groups of equal scores (DAPO); 0 keeps such groups."""
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    """Correction for the difference between the paths that generate and that train."""
    clip_range: ShareAboveZero = 0.2
    """The ratio is clipped to 1 - clip_range ... 1 + clip_range; 1 leaves it free downwards."""
    clip_range_high: Positive | None = None
    """Upper clip, when it differs from the lower."""
    dual_clip: Annotated[float, Bounds(1, above=True)] | None = None
    """Lower bound for negative advantages, a ratio above 1 (Ye et al. 2020); null is off."""
    value_clip_range: Positive | None = 0.2
    """New values stay within this distance of the old ones; null does not clip them."""
    entropy_coef: NonNegative = 0.0
    """Bonus per nat of entropy."""

    @property
    def has_critic(self) -> bool:
        """Whether advantages come from a critic."""
        return self.advantage is AdvantageKind.gae

    @property
    def compares_groups(self) -> bool:
        """Whether advantages compare the responses to one prompt."""
        return self.advantage in (AdvantageKind.grpo, AdvantageKind.rloo)

    def __post_init__(self) -> None:
        super().__post_init__()
        by_token = (AdvantageScale.whiten, AdvantageScale.none)
        require(
            self.compares_groups or self.scale_advantages in by_token,
            f"ppo.scale_advantages={self.scale_advantages} divides by the deviation of the scores of responses; "
            f"expected whiten or none with ppo.advantage={self.advantage}.",
        )
        require(
            self.compares_groups or not self.dynamic_sampling,
            f"ppo.dynamic_sampling={self.dynamic_sampling} replaces groups of equal scores, and "
            f"ppo.advantage={self.advantage} has no groups; expected 0.",
        )
        require(
            self.dual_clip is None or self.policy_loss is PolicyLossKind.clip,
            f"ppo.dual_clip={self.dual_clip} bounds the clipped surrogate; expected null with ppo.policy_loss=cispo.",
        )
        require(
            self.mismatch.low < 1 < self.mismatch.high,
            f"ppo.mismatch: found low={self.mismatch.low} and high={self.mismatch.high}, expected low < 1 < high.",
        )
