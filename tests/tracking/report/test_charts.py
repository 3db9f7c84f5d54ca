"""Curves are smoothed where they jump, and what belongs to a curve has its colour."""

import re

import pytest

from rlhf.tracking.report.charts import curves, overview, smoothed, thin, window
from rlhf.tracking.report.run_folder import StageFolder

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
