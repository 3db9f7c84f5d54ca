"""The charts that several metrics share, and what to look for in them, for the report and the dashboard.

A metric that is in no shared chart has one of its own, whose title is its key. See also: `metric_registry.py`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rlhf.tracking.metric_registry import METRICS

_MARGIN = (
    "Beta times log-ratio of policy to reference. The margin should grow. Where chosen falls below 0, the chosen "
    "responses have become less likely too, only less so than the rejected ones: common, and harmless while answers "
    "read well"
)


class SharedChart(NamedTuple):
    """One chart with several metrics of one unit."""

    title: str
    keys: tuple[str, ...]
    """Of the registry; it stands in the section of the first."""
    look_for: str = ""
    """What it tells."""


SHARED = (
    SharedChart(
        "Rewards by source",
        ("reward/*",),
        "Mean of each source in its own units. One that rises while the others do not is easy to please",
    ),
    SharedChart("Deviation of rewards by source", ("reward/*/std",), "At 0 a source tells no response from another"),
    SharedChart(
        "Responses without a reward, by source",
        ("reward/*/none",),
        "Share to which a source does not apply: it said None. At 1 it counts for nothing",
    ),
    SharedChart("Logged by reward functions", ("reward/log/*",)),
    SharedChart("Held-out rewards by source", ("eval/reward/*",), "Answers to the same prompts at every evaluation"),
    SharedChart("Logged by reward functions, held out", ("eval/reward/log/*",)),
    SharedChart(
        "Score, KL penalty and their sum",
        ("objective/scores", "objective/non_score_reward", "objective/rlhf_reward"),
        "Per response. PPO maximises the sum",
    ),
    SharedChart(
        "Implicit rewards and their margin", ("train/reward_chosen", "train/reward_rejected", "train/margin"), _MARGIN
    ),
    SharedChart(
        "Implicit rewards and their margin, held out",
        ("eval/reward_chosen", "eval/reward_rejected", "eval/margin"),
        _MARGIN,
    ),
    SharedChart("Held-out scores", ("eval/score_mean", "eval/score_std"), "PPO normalises by them"),
    SharedChart("Probability ratio to the sampling policy", ("actor/ratio_mean", "actor/ratio_max")),
    SharedChart(
        "Training over generation probability",
        ("rollout/mismatch_mean", "rollout/mismatch_max", "rollout/mismatch_weight"),
        "Of a token, under the same weights: 1 is right. A mean away from 1, or a largest ratio that grows, makes "
        "training off-policy; ppo.mismatch.correction corrects for it",
    ),
    SharedChart(
        "Log-probability, generation against training",
        ("rollout/logprob_gap_mean", "rollout/logprob_gap_max"),
        "Gap per token: rounding alone, unless both paths compute something else",
    ),
    SharedChart("Responses left out", ("rollout/left_out", "rollout/unscored")),
    SharedChart(
        "Tokens of an iteration", ("rollout/generated_tokens", "rollout/scored_tokens", "rollout/trained_tokens")
    ),
    SharedChart("Learning rate of the step", ("train/lr", "train/lora_lr")),
    SharedChart("Skipped steps", ("train/skipped_steps", "train/scale_search_steps")),
    SharedChart("Gradient norm", ("actor/grad_norm", "critic/grad_norm"), "Before clipping"),
    SharedChart("Learning rate", ("actor/lr", "actor/lora_lr", "critic/lr", "critic/lora_lr")),
    SharedChart(
        "Skipped steps of both models",
        ("actor/skipped_steps", "critic/skipped_steps", "actor/scale_search_steps", "critic/scale_search_steps"),
    ),
    SharedChart("Loss scale", ("actor/loss_scale", "critic/loss_scale")),
    SharedChart("Tokens per second", ("perf/tokens_per_second", "perf/tokens_per_second/*")),
    SharedChart("Slowest and fastest rank", ("perf/slowest_rank_s/*", "perf/fastest_rank_s/*")),
)
LOOK_FOR = {chart.title: chart.look_for for chart in SHARED if chart.look_for} | {
    "rollout/groups_equal": "Near 1 there is nothing to learn: the prompts are too easy or too hard",
}
"""What to look for in a chart, by its title; the title of one that stands alone is its key."""
TITLES = {key: chart.title for chart in SHARED for key in chart.keys}
"""The title of the chart of each metric that shares one."""


def charts() -> dict[tuple[str, str], list[str]]:
    """The keys of every chart, by its section and title, in the order of the registry."""
    found: dict[tuple[str, str], list[str]] = {}
    for key in METRICS:
        first = next((chart.keys[0] for chart in SHARED if key in chart.keys), key)
        found.setdefault((METRICS[first].section, TITLES.get(key, key)), []).append(key)
    return found


def pattern(entry: str) -> str:
    """The regular expression of the keys that a registered one stands for, without those of a family below it."""
    start = entry.removesuffix("*")
    last = "[^/]+" if any(key != entry and key.startswith(start) for key in METRICS) else ".+"
    return re.escape(start).replace(r"\*", "[^/]+") + (last if start != entry else "")
