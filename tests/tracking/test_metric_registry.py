"""The registry knows what the stages log, and refuses the rest."""

import re

import pytest

from rlhf.config.run_config import FOLDERS, STAGES
from rlhf.tracking.chart_table import LOOK_FOR, SHARED, charts, pattern
from rlhf.tracking.console import headlines
from rlhf.tracking.metric_registry import METRICS, check, metric, registered

SUPERVISED = """train/loss train/accuracy train/grad_norm train/lr train/tokens eval/loss eval/accuracy
perf/tokens_per_second memory/rss_bytes memory/device_bytes timing_s/train timing_s/step"""
PPO = """objective/kl objective/kl_per_token objective/entropy objective/scores objective/raw_scores
objective/non_score_reward objective/rlhf_reward objective/kl_coef actor/loss actor/approxkl_avg actor/clipfrac_avg
actor/ratio_mean actor/ratio_max actor/entropy critic/loss critic/clipfrac_avg critic/explained_variance actor/grad_norm
actor/lr critic/grad_norm critic/lr rollout/response_length rollout/eos_rate rollout/logprob_gap_max
rollout/logprob_gap_mean eval/score eval/kl eval/response_length eval/eos_rate eval/distinct_2 gold/vader
timing_s/generate timing_s/score perf/tokens_per_second memory/rss_bytes memory/device_bytes"""
NAMES = {
    "sft": f"{SUPERVISED} eval/perplexity",
    "reward": f"{SUPERVISED} eval/margin eval/score_mean eval/score_std",
    "dpo": f"{SUPERVISED} eval/margin train/margin train/reward_chosen train/reward_rejected train/log_ratio",
    "ppo": PPO,
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_names_of_the_field_are_registered_for_their_stage(stage):
    check(stage, NAMES[stage].split())


@pytest.mark.parametrize("key", ["objective/KL", "loss", "train", "gold", "gold/", "gold/*", "eval/*", "", "/"])
def test_an_unknown_metric_is_refused_and_the_registry_is_named(key):
    with pytest.raises(ValueError, match=r"not registered; add it to METRICS in metric_registry\.py"):
        metric(key)


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("reward/length", "reward/*"),
        ("reward/length/std", "reward/*/std"),
        ("reward/length/none", "reward/*/none"),
        ("reward/log/std", "reward/log/*"),  # a function may call what it logs so
        ("reward/log/a/none", "reward/log/*"),
        ("eval/reward/length", "eval/reward/*"),
        ("eval/reward/log/a", "eval/reward/log/*"),
        ("timing_s/train", "timing_s/*"),
        ("timing_s/train/actor", "timing_s/*/*"),
        ("memory/rss_bytes", "memory/rss_bytes"),
    ],
)
def test_a_metric_belongs_to_the_narrowest_entry(key, entry):
    assert registered(key) == entry
    drawn_by = {name for name in METRICS if "*" in name and re.fullmatch(pattern(name), key)}
    assert entry in drawn_by | {key}
    if "log/" not in key and entry != key:  # no panel leaves those out that a function has named like ours
        assert drawn_by == {entry}


def test_charts_that_several_metrics_share_have_metrics_of_one_unit_and_stand_once():
    keys = [key for shared in SHARED.values() for key in shared]
    assert len(keys) == len(set(keys))
    assert set(keys) <= set(METRICS)
    for title, shared in SHARED.items():
        assert len({METRICS[key].unit for key in shared}) == 1, title
    assert set(LOOK_FOR) <= {title for _, title in charts()}
    assert sorted(key for found in charts().values() for key in found) == sorted(METRICS)


def test_a_metric_of_another_stage_is_refused():
    with pytest.raises(ValueError, match="stage 'sft' logged 'objective/kl'.*registers for ppo"):
        check("sft", ["train/loss", "objective/kl"])


def test_every_entry_can_be_shown_to_a_newcomer():
    for key, entry in METRICS.items():
        assert entry.meaning, key
        assert entry.section, key
        assert entry.stages, key
        assert set(entry.stages) <= set(FOLDERS), key


@pytest.mark.parametrize("stage", STAGES)
def test_the_headlines_of_a_stage_have_different_short_names(stage):
    keys = [key for key, entry in METRICS.items() if entry.headline and stage in entry.stages]
    assert 2 <= len(keys) <= 6
    assert len(headlines(dict.fromkeys(keys, 1.0))) == len(keys)
