"""The charts that several metrics share, and what to look for in them, for the report and the dashboard.

A metric that is in no shared chart has one of its own, whose title is its key. See also: `metric_registry.py`.
"""

from __future__ import annotations

import re

from rlhf.tracking.metric_registry import METRICS

SHARED = {
    "Score, KL penalty and their sum": ("objective/scores", "objective/non_score_reward", "objective/rlhf_reward"),
    "Rewards by source": ("reward/*",),
    "Deviation of rewards by source": ("reward/*/std",),
    "Responses without a reward, by source": ("reward/*/none",),
    "Logged by reward functions": ("reward/log/*",),
    "Held-out rewards by source": ("eval/reward/*",),
    "Logged by reward functions, held out": ("eval/reward/log/*",),
    "Implicit rewards and their margin": ("train/reward_chosen", "train/reward_rejected", "train/margin"),
    "Implicit rewards, held out": ("eval/reward_chosen", "eval/reward_rejected", "eval/margin"),
    "Held-out scores": ("eval/score_mean", "eval/score_std"),
    "Probability ratio to the sampling policy": ("actor/ratio_mean", "actor/ratio_max"),
    "Training over generation probability": tuple(f"rollout/mismatch_{name}" for name in ("mean", "max", "weight")),
    "Log-probability, generation against training": ("rollout/logprob_gap_mean", "rollout/logprob_gap_max"),
    "Responses left out": ("rollout/left_out", "rollout/unscored"),
    "Tokens of an iteration": tuple(f"rollout/{name}_tokens" for name in ("generated", "scored", "trained")),
    "Learning rate of the step": ("train/lr", "train/lora_lr"),
    "Skipped steps": ("train/skipped_steps", "train/scale_search_steps"),
    "Gradient norm": ("actor/grad_norm", "critic/grad_norm"),
    "Learning rate": ("actor/lr", "actor/lora_lr", "critic/lr", "critic/lora_lr"),
    "Skipped steps of both": tuple(f"{m}/{s}_steps" for m in ("actor", "critic") for s in ("skipped", "scale_search")),
    "Loss scale": ("actor/loss_scale", "critic/loss_scale"),
    "Tokens per second": ("perf/tokens_per_second", "perf/tokens_per_second/*"),
    "Slowest and fastest rank": ("perf/slowest_rank_s/*", "perf/fastest_rank_s/*"),
}
"""The registered keys of each chart by its title. All have one unit; the chart stands in the section of the first."""
_MARGIN = (
    "Beta times log-ratio of policy to reference. The margin should grow. Where chosen falls below 0, the chosen "
    "responses have become less likely too, only less so than the rejected ones: common, and harmless while answers "
    "read well"
)
LOOK_FOR = {
    "Score, KL penalty and their sum": "Per response. PPO maximises the sum",
    "Rewards by source": "Mean of each in its own units. One that rises while the others do not is easy to please",
    "Deviation of rewards by source": "At 0 a source tells no response from another",
    "Responses without a reward, by source": "Share of which a source said None. At 1 it counts for nothing",
    "Held-out rewards by source": "Of answers to the same prompts at every evaluation",
    "Implicit rewards and their margin": _MARGIN,
    "Implicit rewards, held out": _MARGIN,
    "Training over generation probability": (
        "Of a token, under the same weights: 1 is right. A mean away from 1, or a largest ratio that grows, makes "
        "training off-policy; ppo.mismatch.correction corrects for it"
    ),
    "Log-probability, generation against training": "Gap of a token: rounding alone, if both paths compute the same",
    "Gradient norm": "Before clipping",
    "rollout/groups_equal": "Near 1 there is nothing to learn: the prompts are too easy or too hard",
}
"""What to look for in a chart, by its title; the title of one that stands alone is its key."""
TITLES = {key: title for title, keys in SHARED.items() for key in keys}
"""The title of the chart of each metric that shares one."""


def charts() -> dict[tuple[str, str], list[str]]:
    """The keys of every chart, by its section and title, in the order of the registry."""
    found: dict[tuple[str, str], list[str]] = {}
    for key in METRICS:
        title = TITLES.get(key, key)
        found.setdefault((METRICS[SHARED.get(title, (key,))[0]].section, title), []).append(key)
    return found


def pattern(entry: str) -> str:
    """The regular expression of the keys that a registered one stands for, without those of a family below it."""
    start = entry.removesuffix("*")
    last = "[^/]+" if any(key != entry and key.startswith(start) for key in METRICS) else ".+"
    return re.escape(start).replace(r"\*", "[^/]+") + (last if start != entry else "")
