"""Draws charts as SVG inside a page. The only user of matplotlib.

Colours are drawn as placeholders and become the page's CSS variables, so that one chart serves a light and a dark page.
Text of a model or a data set is never drawn; names of metrics are, escaped. Left out: what is shown (see `figures.py`).
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rlhf.tracking.text_table import printable, printable_lines

Points = Sequence[tuple[float, float]]

_INK, _QUIET = "#010101", "#020202"
_SERIES = ("#030303", "#040404", "#050505", "#060606", "#070707", "#080808", "#090909", "#0a0a0a")
_VARIABLES = {_INK: "--ink", _QUIET: "--quiet", **{c: f"--series-{i}" for i, c in enumerate(_SERIES)}}
LINES = ("solid", "dashed", "dotted")
DISTINCT = len(LINES) * len(_SERIES)
"""Curves of one chart that can be told apart, by colour and then by the style of the line."""
_TITLE_INCHES, _CHARACTER_INCHES = 0.42, 0.085  # of an axis label with its gaps, and of a digit
_LARGEST = 1e100  # beyond, the arithmetic of axes overflows
_SMOOTH_FROM = 21  # points of a curve that is smoothed
_MOST_POINTS = 400  # of a curve: more cannot be told apart, and a report stays small
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _QUIET,
    "axes.edgecolor": _QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(linestyle=LINES) * cycler(color=_SERIES),
    "axes.grid": True,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "text.parse_math": False,
    "grid.color": _QUIET,
    "grid.alpha": 0.18,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Frame:
    """Title and axes of a chart."""

    title: str
    """Read out by screen readers."""
    x: str
    """Axis label with unit."""
    y: str
    size: tuple[float, float] = (4.6, 2.6)
    """Inches."""


def curves(frame: Frame, series: Mapping[str, Points], *, legend: bool = True) -> str:
    """Draw lines over a common axis, with a legend if there are several; one point is drawn as a dot.

    A noisy curve is drawn faint, with its exponential mean over about `window` points on top.
    """
    with _chart(frame) as chart:
        for label, points in series.items():
            width = window(points)
            shown = thin(smoothed(points, width) if width else points)
            marker = "o" if len(shown) < 3 else ""
            (line,) = chart.axes.plot(*_columns(shown), label=label, marker=marker, markersize=3, linewidth=1.5)
            if width:
                chart.axes.plot(*_columns(thin(points)), **_like(line), alpha=0.3, linewidth=1)
        if legend and len(series) > 1:
            chart.axes.legend()
        chart.axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return chart.svg


def _like(line: Line2D) -> dict[str, Any]:
    """Colour and style of a line, for what belongs to it."""
    return {"color": line.get_color(), "linestyle": line.get_linestyle()}


def window(points: Points) -> int:
    """Points over which a curve is smoothed; 0 if it has few points or is smooth already."""
    if len(points) < _SMOOTH_FROM:
        return 0
    y = _columns(points)[1]
    mean = sum(y) / len(y)
    jumps = sum((new - old) * (new - old) for old, new in zip(y, y[1:], strict=False))
    return 0 if jumps <= 0.1 * sum((value - mean) * (value - mean) for value in y) else max(5, len(points) // 20)


def smoothed(points: Points, width: int) -> list[tuple[float, float]]:
    """The exponential mean over about `width` points up to each one, corrected for the bias towards 0 at the start."""
    keep, total, weight, found = 1 - 2 / (width + 1), 0.0, 0.0, []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        found.append((x, total / weight))
    return found


def frontier(frame: Frame, series: Mapping[str, Points]) -> str:
    """Draw points in the order of training over the root of the KL, the first in a ring (Gao et al. 2023, figure 1)."""
    with _chart(frame) as chart:
        for label, points in series.items():
            x, y = _columns([(math.sqrt(max(kl, 0.0)), value) for kl, value in points])
            (line,) = chart.axes.plot(x, y, marker="o", markersize=4, linewidth=1, label=label)
            chart.axes.plot(x[:1], y[:1], **_like(line), marker="o", markersize=9, fillstyle="none")
        chart.axes.legend()
    return chart.svg


def distributions(frame: Frame, samples: Mapping[str, Sequence[float]]) -> str:
    """Draw histograms over common bins, as shares, so that different numbers of samples compare."""
    values = [value for group in samples.values() for value in group]
    with _chart(frame) as chart:
        low, high = min(values, default=0.0), max(values, default=1.0)
        spread = (low, high) if high > low else (low - 0.5, high + 0.5)
        for label, group in samples.items():
            weights = [1 / len(group)] * len(group)
            chart.axes.hist(group, bins=24, range=spread, weights=weights, label=label, alpha=0.55)
        chart.axes.legend()
    return chart.svg


def stacked(frame: Frame, series: Mapping[str, Points]) -> str:
    """Draw areas on top of each other over the steps; a step without a value counts as zero."""
    steps = sorted({x for points in series.values() for x, _ in points})
    steps = [x for x, _ in thin([(step, 0.0) for step in steps])]
    with _chart(frame, layout="constrained") as chart:
        values = [[dict(points).get(step, 0.0) for step in steps] for points in series.values()]
        if len(steps) > 1:
            chart.axes.stackplot(steps, values, labels=list(series), alpha=0.8)
            chart.axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        else:
            chart.axes.barh(list(series), [sum(row) for row in values], color=_SERIES[0], alpha=0.8)
            chart.axes.set(xlabel=frame.y, ylabel="")
        chart.axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    return chart.svg


def bars(frame: Frame, groups: Mapping[str, Mapping[str, float]]) -> str:
    """Draw horizontal bars: for each group, one of every name."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    height = 0.8 / max(len(names), 1)
    with _chart(frame, layout="constrained") as chart:
        for index, name in enumerate(names):
            at = [row + (index - (len(names) - 1) / 2) * height for row in range(len(groups))]
            chart.axes.barh(at, [values.get(name, 0.0) for values in groups.values()], height, label=name, alpha=0.85)
        chart.axes.set_yticks(range(len(groups)), list(groups))
        chart.axes.invert_yaxis()
        chart.axes.grid(visible=False, axis="y")
        chart.axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return chart.svg


def thin(points: Points) -> list[tuple[float, float]]:
    """At most `_MOST_POINTS` points: means of neighbours, and the first and the last as they are."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    inner, step = points[1:-1], (len(points) - 2) / (_MOST_POINTS - 2)
    cuts = [round(index * step) for index in range(_MOST_POINTS - 1)]
    windows = [inner[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False)]
    means = [tuple(sum(column) / len(window) for column in zip(*window, strict=True)) for window in windows if window]
    return [points[0], *((x, y) for x, y in means), points[-1]]


@dataclass
class _Chart:
    axes: Axes
    svg: str = ""


@contextmanager
def _chart(frame: Frame, layout: Literal["constrained"] | None = None) -> Iterator[_Chart]:
    """A chart to draw in. `layout` fits what stands outside the axes, and takes half of the time."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": frame.title}):
        figure = Figure(figsize=frame.size, layout=layout)
        chart = _Chart(figure.add_subplot())
        chart.axes.set(xlabel=frame.x, ylabel=frame.y)
        for axis in (chart.axes.xaxis, chart.axes.yaxis):
            axis.set_major_formatter(FuncFormatter(_short))
        yield chart
        if layout is None:
            _set_margins(figure, chart.axes)
        chart.svg = _inline(figure, frame.title)


def _set_margins(figure: Figure, axes: Axes) -> None:
    """Leave space for the axis labels and for the longest number beside the vertical axis."""
    width, height = figure.get_size_inches()
    longest = max((len(_short(value, 0)) for value in axes.yaxis.get_major_locator()()), default=0)
    left = _TITLE_INCHES + _CHARACTER_INCHES * longest
    figure.subplots_adjust(left=left / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.12 / height)


def _inline(figure: Figure, title: str) -> str:
    """The figure as an `<svg>` element with the colours and the font of the page."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser draws the text with its own fonts
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = printable_lines(file.getvalue())
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # every chart has the same ids, and a page may have each once
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    label = f'<svg role="img" aria-label="{html.escape(printable(title))}" class="chart"'
    return re.sub(r'(width|height)="[\d.]+pt" ', "", svg.replace("<svg", label, 1), count=2)


def _short(value: float, _position: int) -> str:
    """`1.5M`, `20k`, `0.25`, `1e-05`."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{suffix}"
    return f"{value:g}"


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [max(-_LARGEST, min(y, _LARGEST)) for _, y in points]
