"""Curves are smoothed where they jump, and what belongs to a curve has its colour."""

import re

from rlhf.tracking.report import charts
from rlhf.tracking.report.charts import Frame, curves, frontier, smoothed, window

FRAME = Frame("title", "x", "y")
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


def strokes(svg):
    return re.findall(r"stroke: (var\(--series-\d\))(; stroke-opacity: 0.3)?", svg)


def test_what_was_logged_is_faint_behind_its_smoothed_curve():
    assert strokes(curves(FRAME, {"a": ZIGZAG, "b": ZIGZAG[:5]}))[:3] == [
        ("var(--series-0)", ""),
        ("var(--series-0)", "; stroke-opacity: 0.3"),
        ("var(--series-1)", ""),
    ]


def test_the_start_of_a_path_is_a_ring_in_its_colour_and_no_text():
    svg = frontier(FRAME, {"a": [(0.0, 1.0), (1.0, 2.0)], "b": [(0.0, 1.1), (1.0, 0.5)]})
    assert ">start<" not in svg
    assert {colour for colour, _ in strokes(svg)} == {"var(--series-0)", "var(--series-1)"}


def test_runs_beyond_the_colours_differ_in_the_kind_of_their_lines():
    svg = curves(FRAME, {str(run): [(0, run), (1, run), (2, run)] for run in range(charts.DISTINCT)}, legend=False)
    styles = re.findall(r'<path d="[^"]*" clip-path="[^"]*" style="([^"]*)"', svg)
    assert len({style for style in styles if "--series" in style}) == charts.DISTINCT
