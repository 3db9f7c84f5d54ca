"""The charts of a stage and of an evaluation, drawn as SVG inside a page. The only user of matplotlib.

Colours are drawn as placeholders and become the page's CSS variables, so that one chart serves a light and a dark page.
Text of a model or a data set is never drawn; names of metrics are, escaped.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rlhf.config.ppo_config import POLICIES
from rlhf.tracking.jsonl_log import by_step, is_number
from rlhf.tracking.metric_registry import Metric, metric
from rlhf.tracking.report.run_folder import StageFolder
from rlhf.tracking.text_table import printable, printable_lines

Points = Sequence[tuple[float, float]]

_INK, _QUIET = "#010101", "#020202"
_SERIES = ("#030303", "#040404", "#050505", "#060606", "#070707", "#080808", "#090909", "#0a0a0a")
_VARIABLES = {_INK: "--ink", _QUIET: "--quiet", **{c: f"--series-{i}" for i, c in enumerate(_SERIES)}}
_INCHES = 4.6, 2.6
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
    "axes.prop_cycle": cycler(color=_SERIES),
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
_OUTSIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)}  # a legend beside the axes


@dataclass(frozen=True)
class Chart:
    """A chart with what stands above it."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class ChartSection:
    """The curves of one section of the registry."""

    name: str
    charts: list[Chart]
    is_open: bool


def overview(stage: StageFolder) -> list[Chart]:
    """PPO at a glance: reward against KL, and the answers before and after."""
    costs = dict(stage.series("eval/kl"))
    keys = [key for key in stage.logged() if key == "eval/score" or key.startswith("gold/")]
    paths = {key: [(costs[step], value) for step, value in stage.series(key) if step in costs] for key in keys}
    paths = {key: points for key, points in paths.items() if points}
    found = [_reward_against_kl(paths)] if paths else []
    answers = by_step(stage.samples)
    if len(answers) > 1:
        first, last = answers[min(answers)], answers[max(answers)]
        for key, unit in (("score", "normalised score"), ("length", "tokens"), ("kl", "nats")):
            groups = {
                when: [float(row[key]) for row in rows if is_number(row.get(key))]
                for when, rows in (("before", first), ("after", last))
            }
            if all(groups.values()):
                caption = f"{len(first)} answers before, {len(last)} after."
                found.append(_histograms(f"{key} of held-out answers", caption, x=unit, groups=groups))
    return found


def sections(stage: StageFolder) -> list[ChartSection]:
    """A curve for each metric, by section; two points, which the table of results has too, open no section."""
    found: dict[str, list[Chart]] = defaultdict(list)
    is_open: dict[str, bool] = defaultdict(bool)
    axis = axis_of(stage.name)
    for key in stage.logged():
        points, entry = stage.series(key), known(key)
        is_drawn_by_cost = entry.section in ("Throughput", "Memory")
        if is_drawn_by_cost or not points or len(points) == 1 < len(stage.rows):
            continue
        gaps = ", ".join(map(str, stage.gaps(key)[:5]))
        caption = entry.meaning + smoothing(points) + (f". Not finite at {axis} {gaps}." if gaps else "")
        unit = entry.unit or key.split("/")[-1]
        found[entry.section].append(curves(key, caption, x=axis, y=unit, series={key: points}))
        is_evaluated_often = entry.section == "Evaluation" and len(points) > 2
        is_open[entry.section] |= entry.section in ("Training", "Objective") or is_evaluated_often
    return [ChartSection(name, charts, is_open[name]) for name, charts in found.items()]


def cost(stage: StageFolder) -> list[Chart]:
    """The charts of time and memory."""
    axis, found = axis_of(stage.name), []
    phases = {key.split("/")[1]: stage.series(key) for key in stage.logged() if key.startswith("timing_s/")}
    phases.pop("step", None)
    if phases:
        caption = f"Seconds in each phase of every {axis}."
        found.append(_stacked(f"Time of {stage.name}", caption, x=axis, y="seconds", series=phases))
    speed = stage.series("perf/tokens_per_second")
    if speed:
        caption = f"Tokens per second, all ranks{smoothing(speed)}."
        found.append(curves(f"Throughput of {stage.name}", caption, x=axis, y="tokens/s", series={"": speed}))
    memory = {}
    for phase, places in stage.planned.items():
        for place in ("device", "host"):
            measured, planned = stage.summary.get(f"memory/{phase}_{place}_bytes"), places.get(place)
            if planned:
                bars = {"planned": planned / 1e9, **({} if measured is None else {"measured": measured / 1e9})}
                memory[f"{phase} ({place})"] = bars
    if memory:
        caption = "Highest memory of the first rank in each phase, as planned before the run and as measured."
        found.append(_bars(f"Memory of {stage.name}", caption, x="GB", groups=memory))
    return found


def calibration(results: Mapping[str, Any], name: str) -> list[Chart]:
    """The reliability diagram of a comparison's reward model; none without pairs."""
    try:
        bins = [(row["confidence"], row["right"]["mean"]) for row in results["reward_model"]["calibration"]["bins"]]
    except (KeyError, TypeError):  # the comparison had no reward model, or the file is odd
        return []
    points = [(float(sure), float(right)) for sure, right in bins if is_number(sure) and is_number(right)]
    if not points:
        return []
    series = {"reward model": points, "as sure as right": [(0.5, 0.5), (0.75, 0.75), (1.0, 1.0)]}
    caption = "Below the diagonal the reward model is surer than it is right."
    return [curves(f"Calibration {name}".strip(), caption, x="confidence", y="share that is right", series=series)]


def axis_of(stage: str) -> str:
    """The name of a stage's steps, for axes and captions."""
    return "iteration" if stage in POLICIES else "step"


def known(key: str) -> Metric:
    """The registry's entry of a metric; just its name if another version logged it."""
    try:
        return metric(key)
    except ValueError:
        return Metric("Other", "", (), f"{key}: not a metric of this version")


def curves(title: str, caption: str, *, x: str, y: str, series: Mapping[str, Points]) -> Chart:
    """Draw lines over a common axis, with a legend if there are several; one point is drawn as a dot.

    A noisy curve is drawn faint, with its exponential mean over about `window` points on top.
    """
    axes = _axes(x, y)
    for label, points in series.items():
        width = window(points)
        shown = thin(smoothed(points, width) if width else points)
        marker = "o" if len(shown) < 3 else ""
        (line,) = axes.plot(*_columns(shown), label=label, marker=marker, markersize=3, linewidth=1.5)
        if width:
            axes.plot(*_columns(thin(points)), color=line.get_color(), alpha=0.3, linewidth=1)
    if len(series) > 1:
        axes.legend()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return _chart(axes, title, caption=caption)


def smoothing(points: Points) -> str:
    """How a curve was smoothed, for its caption; empty if it was not."""
    width = window(points)
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


def thin(points: Points) -> Points:
    """Every n-th point, so that at most `_MOST_POINTS` and the last one are left."""
    return points if len(points) <= _MOST_POINTS else [*points[: -1 : -(-len(points) // _MOST_POINTS)], points[-1]]


def _reward_against_kl(paths: Mapping[str, Points]) -> Chart:
    """Points in the order of training over the root of the KL, the first in a ring (Gao et al. 2023, figure 1)."""
    axes = _axes("KL to the reference, √nats per response", "mean over held-out prompts")
    for label, points in paths.items():
        x, y = _columns([(math.sqrt(max(kl, 0.0)), value) for kl, value in points])
        (line,) = axes.plot(x, y, marker="o", markersize=4, linewidth=1, label=label)
        axes.plot(x[:1], y[:1], color=line.get_color(), marker="o", markersize=9, fillstyle="none")
    axes.legend()
    caption = (
        "One point for each evaluation, joined in the order of training; the ring is the start. Where the score "
        "goes on rising and a gold metric turns down, the policy pleases its rewards only (Gao et al. 2023)."
    )
    return _chart(axes, "Reward against KL", caption=caption)


def _histograms(title: str, caption: str, *, x: str, groups: Mapping[str, Sequence[float]]) -> Chart:
    """Histograms over common bins, as shares, so that different numbers of samples compare."""
    values = [value for group in groups.values() for value in group]
    low, high = min(values), max(values)
    spread = (low, high) if high > low else (low - 0.5, high + 0.5)
    axes = _axes(x, "share of answers")
    for label, group in groups.items():
        axes.hist(group, bins=24, range=spread, weights=[1 / len(group)] * len(group), label=label, alpha=0.55)
    axes.legend()
    return _chart(axes, title, caption=caption)


def _stacked(title: str, caption: str, *, x: str, y: str, series: Mapping[str, Points]) -> Chart:
    """Areas on top of each other over the steps; a step without a value counts as zero."""
    steps = sorted({step for points in series.values() for step, _ in points})
    steps = [step for step, _ in thin([(step, 0.0) for step in steps])]
    values = [[found.get(step, 0.0) for step in steps] for found in map(dict, series.values())]
    axes = _axes(x, y, layout="constrained")
    if len(steps) > 1:
        axes.stackplot(steps, values, labels=list(series), alpha=0.8)
        axes.legend(**_OUTSIDE)
    else:
        axes.barh(list(series), [sum(row) for row in values], color=_SERIES[0], alpha=0.8)
        axes.set(xlabel=y, ylabel="")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    return _chart(axes, title, caption=caption)


def _bars(title: str, caption: str, *, x: str, groups: Mapping[str, Mapping[str, float]]) -> Chart:
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


def _chart(axes: Axes, title: str, *, caption: str) -> Chart:
    """The chart as an `<svg>` element with the colours and the font of the page; screen readers read out its title."""
    figure, (width, height) = axes.get_figure(root=True), _INCHES
    assert figure is not None
    if figure.get_layout_engine() is None:  # leave space for the longest number beside the vertical axis
        longest = max((len(_short(value, 0)) for value in axes.yaxis.get_major_locator()()), default=0)
        left = _TITLE_INCHES + _CHARACTER_INCHES * longest
        figure.subplots_adjust(left=left / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.12 / height)
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
