"""Curves are smoothed where they jump, and what belongs to a curve has its colour."""

import re

import pytest

from rlhf.tracking.report.charts import curves, smoothed, thin, window
from rlhf.tracking.report.run_folder import StageFolder
from rlhf.tracking.report.stage_charts import cost, labels_of, overview, phases_of, sections

ZIGZAG = [(step, float(step % 2)) for step in range(40)]


def test_an_exponential_mean_starts_at_the_first_point_and_forgets():
    points = [(1, 4.0), (2, 1.0), (3, 1.0)]  # of about three points: each counts twice the one before it
    assert smoothed(points, 3) == [(1, 4.0), (2, (4 + 2 * 1) / 3), (3, (4 + 2 + 4) / 7)]
    constant = smoothed([(step, 2.5) for step in range(30)], 7)
    assert {round(value, 12) for _, value in constant} == {2.5}


def test_only_long_curves_that_jump_are_smoothed():
    assert window(ZIGZAG) == 5
    assert window(ZIGZAG * 5) == 10
    assert window(ZIGZAG[:20]) == 0
    assert window([(step, step / 40) for step in range(40)]) == 0
    assert window([(step, 1.0) for step in range(40)]) == 0


@pytest.mark.parametrize("count", [1, 400, 401, 800, 12345])
def test_a_long_curve_keeps_its_ends_and_few_points_between(count):
    points = [(step, float(step)) for step in range(count)]
    found = thin(points)
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert found == sorted(set(found))
    assert min(count, 200) <= len(found) <= 401


def strokes(svg):
    return re.findall(r"stroke: (var\(--series-\d\))(; stroke-opacity: 0.3)?", svg)


def test_what_was_logged_is_faint_behind_its_smoothed_curve():
    chart = curves("title", "", x="x", y="y", series={"a": ZIGZAG, "b": ZIGZAG[:5]})
    assert strokes(chart.svg)[:3] == [
        ("var(--series-0)", ""),
        ("var(--series-0)", "; stroke-opacity: 0.3"),
        ("var(--series-1)", ""),
    ]


def test_the_start_of_a_path_is_a_ring_in_its_colour_and_no_text():
    rows = [
        {"step": 0, "eval/kl": 0.0, "eval/score": 1.0, "gold/a": 1.1},
        {"step": 1, "eval/kl": 1.0, "eval/score": 2.0, "gold/a": 0.5},
    ]
    stage = StageFolder("ppo", rows, samples=[], before={}, after={}, summary={}, planned={}, is_finished=True)
    (chart,) = overview(stage)
    assert ">start<" not in chart.svg
    assert {colour for colour, _ in strokes(chart.svg)} == {"var(--series-0)", "var(--series-1)"}


def stage(rows, name="ppo"):
    return StageFolder(name, rows, samples=[], before={}, after={}, summary={}, planned={}, is_finished=False)


def texts(svg):
    return re.findall(r">([^<>\n]+)</text>", svg)


def rows_of(**series):
    """Rows 1, 2, ... of the metrics; None is a value that was not finite, Ellipsis one that was not logged."""
    count = len(next(iter(series.values())))
    rows = [
        {key: values[place] for key, values in series.items() if values[place] is not ...} for place in range(count)
    ]
    return [{"step": number, **row} for number, row in enumerate(rows, start=1)]


def test_the_seconds_of_a_step_are_divided_among_its_phases_and_their_parts():
    row = {"timing_s/step": 20.0, "timing_s/train": 9.0, "timing_s/train/critic": 3.0, "timing_s/train/actor": 5.0}
    row |= {"timing_s/generate": 4.0, "timing_s/score": 3.0, "timing_s/score/reward": 3.0, "timing_s/new": 1.0}
    found = phases_of(row | {"timing_s/save": None, "objective/kl": 1.0})
    assert found == {"generate": 4, "score": 0, "reward": 3, "train": 1, "actor": 5, "critic": 3, "new": 1, "other": 3}
    assert list(found) == ["generate", "score", "reward", "train", "actor", "critic", "new", "other"]
    assert sum(found.values()) == 20
    assert phases_of({"timing_s/train": 2.0}) == {"train": 2.0}  # without the whole, nothing is known of the rest
    assert phases_of({}) == {}


def test_time_is_a_chart_over_all_steps_and_a_timeline_of_three():
    seconds = [5.0, 1.0, 9.0, 2.0]
    rows = [{"step": 0, "timing_s/step": 99.0}]  # opening the models is no iteration
    rows += [{"step": n, "timing_s/step": s, "timing_s/train": s / 2} for n, s in enumerate(seconds, start=1)]
    over_steps, single = cost(stage(rows))
    assert (over_steps.title, single.title) == ("Time of ppo", "One iteration of ppo")
    assert {"train", "other"} <= set(texts(over_steps.svg))
    assert {"usual: 4", "slowest: 3", "last: 4", "train", "other"} <= set(texts(single.svg))  # of 1, 2, 5, 9 the 2
    (only,) = cost(stage(rows[:2], name="sft"))
    assert only.title == "Time of sft"
    assert "step 1" in texts(only.svg)
    assert cost(stage(rows[:1])) == []


def test_ranks_are_compared_by_phase_where_there_are_several():
    rows = [
        {
            "step": n,
            "perf/fastest_rank_s/train": 1.0,
            "perf/slowest_rank_s/train": 2.0 + n,
            "perf/tokens_per_second": 1.0,
        }
        for n in (1, 2, 3)
    ]
    ranks, speed = cost(stage(rows))
    assert {"train", "fastest", "slowest"} <= set(texts(ranks.svg))
    assert speed.title == "Throughput of ppo"
    assert [chart.title for chart in cost(stage([{"step": 1, "perf/tokens_per_second": 2.0}]))] == ["Throughput of ppo"]


def charts_of(rows, name="ppo"):
    return {chart.title: chart for section in sections(stage(rows, name)) for chart in section.charts}


def test_metrics_of_one_kind_share_a_chart_with_their_short_names():
    series = {f"reward/{name}{end}": [1.0, 2.0] for name in ("brief", "right") for end in ("", "/std", "/none")}
    found = charts_of(rows_of(**series, **{"objective/kl": [0.0, 1.0]}))
    kinds = ["Rewards by source", "Deviation of rewards by source", "Responses without a reward, by source"]
    assert list(found) == ["objective/kl", *kinds]
    for kind in kinds:
        assert {"brief", "right"} <= set(texts(found[kind].svg)), kind
    alone = charts_of(rows_of(**{"reward/brief": [1.0, 2.0]}))
    assert list(alone) == ["reward/brief"]


def test_the_curves_of_dpo_say_what_falling_chosen_rewards_mean():
    series = {f"train/{name}": [0.0, -1.0] for name in ("reward_chosen", "reward_rejected")}
    found = charts_of(rows_of(**series, **{"train/margin": [0.0, 1.0]}), name="dpo")
    (chart,) = found.values()
    assert {"reward_chosen", "reward_rejected", "margin"} <= set(texts(chart.svg))
    assert "Where chosen falls below 0" in chart.caption
    (margin,) = charts_of(rows_of(**{"train/margin": [0.0, 1.0]}), name="reward").values()
    assert "Beta" not in margin.caption  # a reward model has no beta


def test_a_moving_average_is_drawn_beside_what_it_averages():
    series = {"eval/score": [0.0, 1.0], "ema/score": [..., 0.5], "gold/a": [2.0, 1.0], "ema/gold/a": [3.0, 1.5]}
    found = charts_of(rows_of(**series) + [{"step": 3, "ema/score": 0.7}])
    assert list(found) == ["eval/score", "gold/a"]
    assert {"score", "score, moving average"} <= set(texts(found["eval/score"].svg))
    assert "moving average" not in found["gold/a"].caption


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        (["reward/a/std", "reward/b/std"], ["a", "b"]),
        (["actor/lr", "critic/lr", "critic/lora_lr"], ["actor/lr", "critic/lr", "critic/lora_lr"]),
        (["actor/grad_norm", "critic/grad_norm"], ["actor", "critic"]),
        (["perf/x", "perf/x/train"], ["x", "x/train"]),
        (["a/a", "a/a/a"], ["a", "a/a"]),
    ],
)
def test_names_are_shortened_and_stay_different(keys, labels):
    assert labels_of(keys, stage([])) == labels


def test_what_never_changed_is_a_number_and_no_chart():
    series = {
        "rollout/left_out": [0.0, 0.0, 0.0],
        "rollout/mismatch_mean": [1.0, 1.0 + 1e-7, 1.0],
        "actor/lr": [1e-3] * 3,
    }
    found = sections(stage(rows_of(**series, **{"actor/grad_norm": [1.0, None, 1.0]})))
    assert [(section.name, list(section.constant)) for section in found] == [
        ("Rollout", ["rollout/left_out", "rollout/mismatch_mean"]),
        ("Optimizer", ["actor/lr"]),
    ]
    assert [chart.title for section in found for chart in section.charts] == ["actor/grad_norm"]
    assert "actor/grad_norm was not finite at iteration 2." in found[1].charts[0].caption


def test_a_stage_of_one_step_shows_its_numbers_as_dots():
    (chart,) = charts_of(rows_of(**{"reward/a": [1.0], "reward/b": [2.0]})).values()
    assert {"a", "b"} <= set(texts(chart.svg))


def test_more_sources_than_colours_are_still_told_apart():
    found = curves("t", "", x="x", y="y", series={f"s{n}": [(0, n), (1, n + 1.0)] for n in range(12)})
    lines = re.findall(r"stroke-dasharray: [\d. ,]+;[^\"]*stroke: (var\(--series-\d\))", found.svg)
    assert sorted(set(lines)) == [f"var(--series-{n})" for n in range(4)]  # the ninth to the twelfth are dashed
    assert set(texts(found.svg)) >= {f"s{n}" for n in range(12)}


def test_a_line_is_broken_where_values_are_missing():
    def strokes_in(values):
        (chart,) = charts_of(rows_of(**{"actor/grad_norm": values})).values()
        drawn = re.search(r'<path d="([^"]*)"[^>]*stroke: var\(--series-0\)', chart.svg)[1]
        return drawn.count("M"), drawn.count("L")

    assert strokes_in([1.0, 2.0, 4.0, 3.0, 1.0]) == (1, 4)
    assert strokes_in([1.0, 2.0, None, 3.0, 1.0]) == (2, 2)
