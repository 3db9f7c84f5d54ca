"""Rewards of whole responses: sources give scores `[B, S]`, which become the one score `[B]` that PPO is paid.

A source is a reward model or a function of the user's (`reward_functions.py`). Each is normalised and clamped if its
settings say so, then all are summed with their weights. See also: `rlhf/algorithms/ppo.py`, where the score of a
response becomes the reward of its last token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.algorithms.groups import normalize_in_groups
from rlhf.algorithms.scores import normalize_scores, penalize_overlong, penalize_unended, weighted_scores
from rlhf.config.bounds import MicroBatchLimit
from rlhf.config.objective_config import ScoreConfig
from rlhf.config.reward_config import RewardCombination
from rlhf.engine.engine import Engine
from rlhf.forward_passes import agreed_pieces, scalar_outputs
from rlhf.models.scalar_head import last_token_scores
from rlhf.reward_calls import RewardFunctions
from rlhf.reward_functions import RewardRows
from rlhf.types import Responses


@dataclass(frozen=True)
class RewardScorer:
    """Asks all sources for their scores."""

    names: Sequence[str]
    """Of all sources, in the order of the settings."""
    models: Mapping[str, Engine]
    functions: RewardFunctions
    limit: MicroBatchLimit
    """Of a forward pass of a model: memory, not results."""

    def score(self, responses: Responses, rows: RewardRows) -> Tensor:
        """What each source says of this rank's responses, `[B, S]` fp32; every rank must call it equally often.

        NaN: the source does not apply. Infinity: it failed, and a failure may be left out.

        Args:
            responses: tokens and masks, for models.
            rows: the same as text, for functions.
        """
        by_function = self.functions.score(rows).to(responses.sequences.device)  # [B, functions]
        found = {f.name: by_function[:, place] for place, f in enumerate(self.functions.functions)}
        for name, engine in self.models.items():
            scores = reward_model_scores(engine, responses, limit=self.limit)
            found[name] = scores.float().where(scores.isfinite(), torch.inf)  # its NaN is not that of a function
        return torch.stack([found[name] for name in self.names], dim=1)


def reward_model_scores(reward: Engine, responses: Responses, *, limit: MicroBatchLimit) -> Tensor:
    """Scores `[B]` of a reward model, in its own units, in pieces within `limit`; a collective.

    Equal sequences get equal scores, which pieces of other shapes would round differently: where scores are compared
    and divided by their deviation, as in a group, such a difference would become an advantage.
    """
    scores = torch.zeros(len(responses), device=responses.sequences.device)
    with reward.evaluating() as model:
        for rows in agreed_pieces(responses, limit):
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


@dataclass
class RunningScale:
    """Mean and standard deviation of all scores so far, for a source that has no held-out ones (Welford 1962)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of the squared distances from the mean."""

    @property
    def std(self) -> float:
        """Sample deviation; 1 while all scores agree."""
        return (self.squares / max(self.count - 1, 1)) ** 0.5 or 1.0

    def update(self, scores: Tensor) -> None:
        """Count the finite ones of `scores` `[B]` in (Chan et al. 1979, for a batch at once)."""
        values = scores[scores.isfinite()].double()
        if not len(values):
            return
        total, mean = self.count + len(values), float(values.mean())
        distance = mean - self.mean
        self.squares += float((values - mean).square().sum()) + distance**2 * self.count * len(values) / total
        self.mean += distance * len(values) / total
        self.count = total


@dataclass(frozen=True)
class ScoredSource:
    """A source of scores, and what its scores count for."""

    name: str
    weight: float = 1.0
    scale: ScoreScale | RunningScale | None = None
    """By which it is normalised; None leaves its scores as they are."""
    clamp: float = 0.0
    """Limit of a score after that, both ways; 0 is none."""

    def shaped(self, scores: Tensor) -> Tensor:
        """Its scores `[B]`, normalised and clamped; NaN and infinity stay."""
        scale = self.scale or ScoreScale()
        found = normalize_scores(scores, mean=scale.mean, std=scale.std, clamp=self.clamp)
        return found.where(scores.isfinite(), scores)

    def at_clamp(self, scores: Tensor) -> Tensor:
        """True where its score is at the clamp, `[B]` bool."""
        return (self.shaped(scores).abs() >= self.clamp) & bool(self.clamp)


@dataclass(frozen=True)
class ScoreShaping:
    """From the scores of all sources to what PPO is paid: normalise, clamp, sum, and penalise a missing EOS and length.

    Its state is that of the running scales, which every rank updates alike with the scores of all ranks.
    """

    config: ScoreConfig
    sources: Sequence[ScoredSource]
    limit: int
    """Most tokens that a response may have."""
    combination: RewardCombination = RewardCombination.sum

    @property
    def running(self) -> dict[str, RunningScale]:
        """The running scales, by the name of the source."""
        return {source.name: source.scale for source in self.sources if isinstance(source.scale, RunningScale)}

    @property
    def is_one_source(self) -> bool:
        """Whether the weighted sum is nothing but the scores of one source."""
        return [source.weight for source in self.sources] == [1.0]

    def observe(self, source_scores: Tensor) -> None:
        """Count the scores `[B, S]` of a rollout of all ranks into the running scales."""
        for source, scores in zip(self.sources, source_scores.T, strict=True):
            if isinstance(source.scale, RunningScale):
                source.scale.update(scores)

    def raw_scores(self, source_scores: Tensor) -> Tensor:
        """The weighted sum of the scores `[B, S]` in the units of the sources, `[B]`; see `scores` for NaN."""
        return self._joined(source_scores, source_scores)

    def scores(self, source_scores: Tensor, groups: Tensor | None, *, ended: Tensor, lengths: Tensor) -> Tensor:
        """Scores `[B]` of responses: NaN where no source applies, infinity where one has failed.

        Args:
            source_scores: `[B, S]`, NaN where a source does not apply, infinity where it failed.
            groups: `[B]` int64, equal for the responses among which scores are normalised, if they are; None leaves
                that out, for held-out answers, whose mean it would make 0.
            ended: `[B]` bool, True where a response ended with an EOS.
            lengths: `[B]`, tokens of each response.
        """
        config = self.config
        shaped = torch.stack(
            [source.shaped(scores) for source, scores in zip(self.sources, source_scores.T, strict=True)], dim=1
        )
        if self.combination is RewardCombination.normalized and groups is not None:
            failed = source_scores.isinf().any(-1, keepdim=True)
            shaped = normalize_in_groups(shaped.masked_fill(failed, torch.nan), groups)
        joined = self._joined(shaped, source_scores)
        scores = penalize_unended(joined, ended, penalty=config.missing_eos_penalty, kind=config.missing_eos_mode)
        share, penalty = config.overlong_share, config.overlong_penalty
        scores = penalize_overlong(scores, lengths, limit=self.limit, share=share, penalty=penalty)
        return scores.where(joined.isfinite(), joined)  # no penalty makes up for a score that is not there

    def clamped_share(self, source_scores: Tensor) -> float:
        """Share of responses of which some score in `[B, S]` is at its clamp, where PPO cannot tell them apart."""
        clamped = [source.at_clamp(scores) for source, scores in zip(self.sources, source_scores.T, strict=True)]
        return float(torch.stack(clamped).any(0).double().mean())

    def metrics(self, source_scores: Tensor) -> dict[str, float]:
        """The share of clamped scores in `[B, S]`, and the mean raw score, unless it is that of one source alone."""
        clamped = {"objective/clamped": self.clamped_share(source_scores)}
        if self.is_one_source:  # which has logged it as `reward/NAME`
            return clamped
        return clamped | {"objective/raw_scores": float(self.raw_scores(source_scores).mean())}

    def _joined(self, scores: Tensor, source_scores: Tensor) -> Tensor:
        weights = torch.tensor([source.weight for source in self.sources])
        joined = weighted_scores(scores, weights)
        return joined.masked_fill(source_scores.isinf().any(-1), torch.inf)

    def state_dict(self) -> dict[str, Any]:
        """The running scales, by the name of the source."""
        return {name: vars(scale).copy() for name, scale in self.running.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, scale in self.running.items():
            vars(scale).update(state[name])


def reward_metrics(names: Sequence[str], source_scores: Tensor) -> dict[str, float]:
    """Mean, sample deviation and share of None of each source, from scores `[B, S]`; failures are in none of them."""
    metrics: dict[str, float] = {}
    for name, scores in zip(names, source_scores.double().T, strict=True):
        found = scores[scores.isfinite()]
        metrics[f"reward/{name}/none"] = float(scores.isnan().double().mean())
        if len(found):
            metrics[f"reward/{name}"] = float(found.mean())
            metrics[f"reward/{name}/std"] = float(found.std(correction=min(1, len(found) - 1)))
    return metrics
