"""Draws charts as SVG for a page. The only user of matplotlib. See also: `stage_charts.py`, which chooses them.

Colours are drawn as placeholders and become the page's CSS variables, so that one chart serves a light and a dark page.
Text of a model or a data set is never drawn; names of metrics are, escaped.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rlhf.tracking.text_table import printable, printable_lines

Points = Sequence[tuple[float, float]]
P = TypeVar("P")

_INK, _QUIET = "#010101", "#020202"
_SERIES = ("#030303", "#040404", "#050505", "#060606", "#070707", "#080808", "#090909", "#0a0a0a")
_VARIABLES = {_INK: "--ink", _QUIET: "--quiet", **{c: f"--series-{i}" for i, c in enumerate(_SERIES)}}
_INCHES = 4.6, 2.6
_TITLE_INCHES, _CHARACTER_INCHES = 0.42, 0.085  # of an axis label with its gaps, and of a digit
_LINE_INCHES, _LEGEND_CHARACTERS = 0.19, 60  # of a legend
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
    "axes.prop_cycle": cycler(linestyle=("-", "--", ":")) * cycler(color=_SERIES),
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
matplotlib.rcParams.update(_STYLE)
PHASES = ("generate", "score", "reward", "train", "actor", "critic", "evaluate", "save")
"""Phases of a step, one after the other, and parts of them."""
OTHER = "other"
"""Name of the rest of a step."""
_OUTSIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # a legend beside the axes


@dataclass(frozen=True)
class Chart:
    """A chart with what stands above it."""

    title: str
    caption: str
    svg: str


def curves(
    title: str,
    caption: str,
    *,
    x: str,
    y: str,
    series: Mapping[str, Points],
    gaps: Mapping[str, Sequence[int]] | None = None,
) -> Chart:
    """Draw lines over a common axis, with a legend if there are several; one point is drawn as a dot.

    A line is broken at the `gaps` of its series, where it has no value.
    A noisy curve is drawn faint, with its exponential mean over about `window` points on top.
    """
    axes = _axes(x, y)
    for label, points in series.items():
        width = window(points)
        shown = thin(smoothed(points, width) if width else points)
        marker = "o" if len(shown) < 3 else ""
        missing = (gaps or {}).get(label, ())
        (line,) = axes.plot(*_broken(shown, missing), label=label, marker=marker, markersize=3, linewidth=1.5)
        if width:
            logged = _broken(thin(points), missing)
            axes.plot(*logged, color=line.get_color(), linestyle=line.get_linestyle(), alpha=0.3, linewidth=1)
    lines = 0
    if len(series) > 1:  # above the axes, where it hides no curve
        columns = max(1, min(len(series), _LEGEND_CHARACTERS // (5 + max(map(len, series)))))
        lines = -(-len(series) // columns)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize="small", borderpad=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return _chart(axes, title, caption=caption, lines=lines)


def smoothing(*series: Points) -> str:
    """How curves were smoothed, for their caption; empty if none was."""
    width = max(map(window, series), default=0)
    return f". Smoothed over about {width} points; what was logged is faint" if width else ""


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


def thin(points: Sequence[P]) -> Sequence[P]:
    """Every n-th point, so that at most `_MOST_POINTS` and the last one are left."""
    return points if len(points) <= _MOST_POINTS else [*points[: -1 : -(-len(points) // _MOST_POINTS)], points[-1]]


def reward_against_kl(paths: Mapping[str, Points]) -> Chart:
    """Points in the order of training over the root of the KL, the first in a ring (Gao et al. 2023, figure 1)."""
    axes = _axes("KL to the reference, √nats per response", "mean over held-out prompts")
    for label, points in paths.items():
        x, y = _columns([(math.sqrt(max(kl, 0.0)), value) for kl, value in points])
        (line,) = axes.plot(x, y, marker="o", markersize=4, linewidth=1, label=label)
        axes.plot(x[:1], y[:1], color=line.get_color(), linestyle="", marker="o", markersize=9, fillstyle="none")
    axes.legend()
    caption = (
        "One point for each evaluation, joined in the order of training; the ring is the start. Where the score "
        "goes on rising and a gold metric turns down, the policy pleases its rewards only (Gao et al. 2023)."
    )
    return _chart(axes, "Reward against KL", caption=caption)


def histograms(title: str, caption: str, *, x: str, groups: Mapping[str, Sequence[float]]) -> Chart:
    """Histograms over common bins, as shares, so that different numbers of samples compare."""
    values = [value for group in groups.values() for value in group]
    low, high = min(values), max(values)
    spread = (low, high) if high > low else (low - 0.5, high + 0.5)
    axes = _axes(x, "share of answers")
    for label, group in groups.items():
        axes.hist(group, bins=24, range=spread, weights=[1 / len(group)] * len(group), label=label, alpha=0.55)
    axes.legend()
    return _chart(axes, title, caption=caption)


def stacked(title: str, caption: str, *, x: str, layers: Mapping[str, Mapping[int, float]]) -> Chart:
    """Seconds on top of each other over the steps; a step without a value counts as zero."""
    steps = thin(sorted({step for layer in layers.values() for step in layer}))
    axes = _axes(x, "seconds", layout="constrained")
    values = [[layer.get(step, 0.0) for step in steps] for layer in layers.values()]
    areas = axes.stackplot(steps, values, labels=list(layers), colors=_colours(layers))
    for area, name in zip(areas, layers, strict=True):
        area.set_alpha(_strength(name))
    axes.legend(**_OUTSIDE, reverse=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return _chart(axes, title, caption=caption)


def timelines(
    title: str, caption: str, *, layers: Mapping[str, Mapping[int, float]], steps: Mapping[str, int]
) -> Chart:
    """A horizontal bar for each named step, with its phases one after the other."""
    axes = _axes("seconds", "", layout="constrained")
    begin = [0.0] * len(steps)
    for (name, layer), colour in zip(layers.items(), _colours(layers), strict=True):
        seconds = [layer.get(step, 0.0) for step in steps.values()]
        axes.barh(range(len(steps)), seconds, 0.6, left=begin, label=name, color=colour, alpha=_strength(name))
        begin = [sum(pair) for pair in zip(begin, seconds, strict=True)]
    axes.set_yticks(range(len(steps)), list(steps))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend(**_OUTSIDE)
    return _chart(axes, title, caption=caption)


def _strength(layer: str) -> float:
    return 0.3 if layer == OTHER else 0.8


def _colours(layers: Mapping[str, Any]) -> list[str]:
    """A colour for each layer, in every chart the same; the rest, which nobody asks about, is quiet."""
    colours = dict(zip(PHASES, _SERIES, strict=True)) | {OTHER: _QUIET}
    return [colours.get(name, _SERIES[place % len(_SERIES)]) for place, name in enumerate(layers)]


def bars(title: str, caption: str, *, x: str, groups: Mapping[str, Mapping[str, float]]) -> Chart:
    """Horizontal bars: for each group, one of every name."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    height = 0.8 / len(names)
    axes = _axes(x, "", layout="constrained")
    for index, name in enumerate(names):
        at = [row + (index - (len(names) - 1) / 2) * height for row in range(len(groups))]
        axes.barh(at, [values.get(name, 0.0) for values in groups.values()], height, label=name, alpha=0.85)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend(**_OUTSIDE)
    return _chart(axes, title, caption=caption)


def _axes(x: str, y: str, *, layout: Literal["constrained"] | None = None) -> Axes:
    """Axes to draw in. `layout="constrained"` fits what stands outside of them, and takes half of the time."""
    axes = Figure(figsize=_INCHES, layout=layout).add_subplot()
    axes.set(xlabel=x, ylabel=y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_short))
    return axes


def _chart(axes: Axes, title: str, *, caption: str, lines: int = 0) -> Chart:
    """The chart as an `<svg>` element with the colours and the font of the page; screen readers read out its title.

    `lines` are those of a legend above the axes.
    """
    figure, (width, height) = axes.get_figure(root=True), _INCHES
    assert figure is not None
    if figure.get_layout_engine() is None:  # leave space for the longest number beside the vertical axis
        longest = max((len(_short(value, 0)) for value in axes.yaxis.get_major_locator()()), default=0)
        left = _TITLE_INCHES + _CHARACTER_INCHES * longest
        top = 1 - (0.12 + _LINE_INCHES * lines) / height
        figure.subplots_adjust(left=left / width, right=1 - 0.15 / width, bottom=0.5 / height, top=top)
    file = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": title}):  # the salt makes ids unique
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser draws the text with its own fonts
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = printable_lines(file.getvalue())
    svg = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # every chart has the same ids, and a page may have each once
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    label = f'<svg role="img" aria-label="{html.escape(printable(title))}" class="chart"'
    svg = re.sub(r'(width|height)="[\d.]+pt" ', "", svg.replace("<svg", label, 1), count=2)
    return Chart(title, caption, svg)


def _short(value: float, _position: int) -> str:
    """`1.5M`, `20k`, `0.25`, `1e-05`."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{suffix}"
    return f"{value:g}"


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [max(-_LARGEST, min(y, _LARGEST)) for _, y in points]


def _broken(points: Points, gaps: Sequence[int]) -> tuple[list[float], list[float]]:
    """The columns with NaN at the gaps, where matplotlib ends a line and begins another."""
    x, y = _columns(points)
    whole = sorted(
        [*zip(x, y, strict=True), *((float(gap), math.nan) for gap in thin(gaps))], key=lambda point: point[0]
    )
    return [x for x, _ in whole], [y for _, y in whole]
