"""Rewards of whole responses: a source gives raw scores `[B]`, which become what PPO is paid.

A source is anything with `score`; today that is a reward model. See also: `rlhf/algorithms/ppo.py`, where the score of
a response becomes the reward of its last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlhf.algorithms.scores import normalize_scores, penalize_overlong, penalize_unended
from rlhf.config.ppo_config import ScoreConfig
from rlhf.engine.engine import Engine
from rlhf.forward_passes import scalar_outputs
from rlhf.models.scalar_head import last_token_scores
from rlhf.types import Responses


class RewardSource(Protocol):
    """Scores responses."""

    def score(self, responses: Responses, *, prompts: tuple[str, ...], texts: tuple[str, ...]) -> Tensor:
        """Raw scores `[B]` of this rank's responses, on their device; every rank calls it equally often.

        Args:
            responses: tokens and masks.
            prompts: B prompts as text.
            texts: B responses as text.
        """
        ...


@dataclass(frozen=True)
class RewardModel:
    """A reward model as a source of scores."""

    engine: Engine
    micro_batch_size: int
    """Sequences per forward pass: memory, not results."""

    def score(self, responses: Responses, *, prompts: tuple[str, ...], texts: tuple[str, ...]) -> Tensor:
        """Its scalar at the last token of each sequence, `[B]`; it reads tokens, not texts."""
        return reward_model_scores(self.engine, responses, size=self.micro_batch_size)


def reward_model_scores(reward: Engine, responses: Responses, *, size: int) -> Tensor:
    """Scores `[B]` of a reward model, in its own units; `size` sequences per forward pass.

    Equal sequences get equal scores, which pieces of other shapes would round differently: where scores are compared
    and divided by their deviation, as in a group, such a difference would become an advantage.
    """
    scores = torch.zeros(len(responses), device=responses.sequences.device)
    with reward.evaluating() as model:
        for rows in responses.pieces(size):
            piece = responses.rows(rows).trimmed()
            scores[rows] = last_token_scores(scalar_outputs(model, piece), piece.attention_mask)  # [b, t] -> [b]
    return scores[_first_equal_rows(responses).to(scores.device)]


def _first_equal_rows(responses: Responses) -> Tensor:
    """For each row the first row with the same tokens, `[B]` int64 on the CPU."""
    sequences, mask = responses.sequences.cpu(), responses.attention_mask.cpu()  # waits for the device, once
    first: dict[tuple[int, ...], int] = {}
    rows = (tuple(tokens[real].tolist()) for tokens, real in zip(sequences, mask, strict=True))
    return torch.tensor([first.setdefault(tokens, row) for row, tokens in enumerate(rows)])


@dataclass(frozen=True)
class ScoreScale:
    """Mean and standard deviation of held-out scores, in the reward model's own units."""

    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class ScoreShaping:
    """From raw scores to what PPO is paid: normalise, clamp, and penalise a missing EOS and overlong responses."""

    config: ScoreConfig
    scale: ScoreScale
    limit: int
    """Most tokens that a response may have."""

    def scores(self, raw_scores: Tensor, ended: Tensor, *, lengths: Tensor) -> Tensor:
        """Scores `[B]` of responses.

        Args:
            raw_scores: `[B]`.
            ended: `[B]` bool, True where a response ended with an EOS.
            lengths: `[B]`, tokens of each response.
        """
        config, scores = self.config, self._normalized(raw_scores)
        scores = penalize_unended(scores, ended, penalty=config.missing_eos_penalty, kind=config.missing_eos_mode)
        share, penalty = config.overlong_share, config.overlong_penalty
        return penalize_overlong(scores, lengths, limit=self.limit, share=share, penalty=penalty)

    def clamped_share(self, raw_scores: Tensor) -> float:
        """Share of responses whose score `[B]` is at the clamp, where PPO cannot tell them apart."""
        clamp = self._clamp
        return 0.0 if clamp is None else float((self._normalized(raw_scores).abs() >= clamp).double().mean())

    @property
    def _clamp(self) -> float | None:
        return self.config.clamp if self.config.normalize and self.config.clamp else None

    def _normalized(self, raw_scores: Tensor) -> Tensor:
        return normalize_scores(raw_scores, mean=self.scale.mean, std=self.scale.std, clamp=self._clamp)
