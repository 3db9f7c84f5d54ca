"""The charts of a stage and of an evaluation: what they show, over what, and in which unit.

See also: `charts.py`, which draws them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rlhf.config.ppo_config import POLICIES
from rlhf.tracking.answer_statistics import by_step, is_number
from rlhf.tracking.metric_registry import Metric, metric
from rlhf.tracking.report import charts
from rlhf.tracking.report.charts import Frame
from rlhf.tracking.report.run_folder import StageFolder

_OWN_CHARTS = ("Throughput", "Memory")  # sections that `cost` draws
_ALWAYS_OPEN = ("Training", "Objective")


@dataclass(frozen=True)
class Figure:
    """A chart with what stands above it."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class FigureSection:
    """The curves of one section of the registry."""

    name: str
    figures: list[Figure]
    is_open: bool


def overview(stage: StageFolder) -> list[Figure]:
    """PPO at a glance: reward against KL, and the answers before and after."""
    found = []
    judges = [key for key in stage.logged() if key == "eval/score" or key.startswith("gold/")]
    costs = dict(stage.series("eval/kl"))
    paths = {key: [(costs[step], value) for step, value in stage.series(key) if step in costs] for key in judges}
    paths = {key: path for key, path in paths.items() if path}
    if paths:
        frame = Frame("Reward against KL", "KL to the reference, √nats per response", "mean over held-out prompts")
        caption = (
            "One point for each evaluation, joined in the order of training; the ring is the start. Where the score "
            "goes on rising and a gold metric turns down, the policy pleases the reward model only (Gao et al. 2023)."
        )
        found.append(Figure("Reward against KL", caption, charts.frontier(frame, paths)))
    answers = by_step(stage.samples)
    if len(answers) > 1:
        first, last = answers[min(answers)], answers[max(answers)]
        for key, unit in (("score", "normalised score"), ("length", "tokens"), ("kl", "nats")):
            groups = {
                when: [float(row[key]) for row in rows if is_number(row.get(key))]
                for when, rows in (("before", first), ("after", last))
            }
            if all(groups.values()):
                title, caption = f"{key} of held-out answers", f"{len(first)} answers before, {len(last)} after."
                svg = charts.distributions(Frame(title, unit, "share of answers"), groups)
                found.append(Figure(title, caption, svg))
    return found


def sections(stage: StageFolder) -> list[FigureSection]:
    """A curve for each metric, by section; two points, which the table of results has too, open no section."""
    found: dict[str, list[Figure]] = defaultdict(list)
    longest: dict[str, int] = defaultdict(int)
    axis = axis_of(stage.name)
    for key in stage.logged():
        points, entry = stage.series(key), known(key)
        if entry.section in _OWN_CHARTS or not points or len(points) == 1 < len(stage.rows):
            continue
        gaps = ", ".join(map(str, stage.gaps(key)[:5]))
        caption = entry.meaning + smoothing(points) + (f". Not finite at {axis} {gaps}." if gaps else "")
        svg = charts.curves(Frame(key, axis, entry.unit or key.split("/")[-1]), {key: points})
        found[entry.section].append(Figure(key, caption, svg))
        longest[entry.section] = max(longest[entry.section], len(points))
    opening = {name for name in found if name in _ALWAYS_OPEN or (name == "Evaluation" and longest[name] > 2)}
    return [FigureSection(name, figures, name in opening) for name, figures in found.items()]


def cost(stage: StageFolder) -> list[Figure]:
    """Where time and memory went."""
    axis, found = axis_of(stage.name), []
    phases = {key.split("/")[1]: stage.series(key) for key in stage.logged() if key.startswith("timing_s/")}
    phases.pop("step", None)
    if phases:
        svg = charts.stacked(Frame(f"Time of {stage.name}", axis, "seconds"), phases)
        found.append(Figure("Time", f"Seconds in each phase of every {axis}.", svg))
    speed = stage.series("perf/tokens_per_second")
    if speed:
        svg = charts.curves(Frame(f"Throughput of {stage.name}", axis, "tokens/s"), {"": speed})
        found.append(Figure("Throughput", f"Tokens per second, all ranks{smoothing(speed)}.", svg))
    memory = _memory(stage)
    if memory:
        caption = "Highest memory of the first rank in each phase, as planned before the run and as measured."
        found.append(Figure("Memory", caption, charts.bars(Frame(f"Memory of {stage.name}", "GB", ""), memory)))
    return found


def _memory(stage: StageFolder) -> dict[str, dict[str, float]]:
    """GB planned and measured, by phase and place."""
    found: dict[str, dict[str, float]] = {}
    for phase, places in stage.planned.items():
        for place in ("device", "host"):
            measured, planned = stage.summary.get(f"memory/{phase}_{place}_bytes"), places.get(place)
            if planned:
                bars = {"planned": planned / 1e9, **({} if measured is None else {"measured": measured / 1e9})}
                found[f"{phase} ({place})"] = bars
    return found


def calibration(results: dict[str, Any], name: str) -> str:
    """The reliability diagram of a comparison's reward model, SVG; empty without pairs."""
    found: Any = results
    for key in ("reward_model", "calibration", "bins"):
        found = found.get(key) if isinstance(found, dict) else None
    bins = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    pairs = [(row.get("confidence"), row["right"].get("mean")) for row in bins if isinstance(row.get("right"), dict)]
    points = [(float(sure), float(right)) for sure, right in pairs if is_number(sure) and is_number(right)]
    if not points:
        return ""
    frame = Frame(f"Calibration {name}".strip(), "confidence", "share that is right")
    return charts.curves(frame, {"reward model": points, "as sure as right": [(0.5, 0.5), (0.75, 0.75), (1.0, 1.0)]})


def axis_of(stage: str) -> str:
    """What the steps of a stage are called."""
    return "iteration" if stage in POLICIES else "step"


def smoothing(points: charts.Points) -> str:
    """How a curve was smoothed, for its caption; empty if it was not."""
    width = charts.window(points)
    return f". Smoothed over about {width} points; what was logged is faint" if width else ""


def known(key: str) -> Metric:
    """The registry's entry of a metric; just its name if another version logged it."""
    try:
        return metric(key)
    except ValueError:
        return Metric("Other", "", (), f"{key}: not a metric of this version")
