"""Which charts a stage has: what they show, over what, and in which unit.

Left out: how they are drawn (`charts.py`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from rlhf.config.stage_configs import POLICIES
from rlhf.tracking.answer_statistics import by_step, is_number
from rlhf.tracking.metric_registry import Metric, metric
from rlhf.tracking.report import charts
from rlhf.tracking.report.charts import Frame
from rlhf.tracking.report.reading import Row
from rlhf.tracking.report.run_folder import StageFolder

_STEP = dict.fromkeys(POLICIES, "iteration")
_ELSEWHERE = ("Throughput", "Memory")  # sections that have charts of their own


_ALWAYS_OPEN = ("Training", "Objective")


@dataclass(frozen=True)
class Figure:
    """A chart and what stands over and under it."""

    title: str
    caption: str
    svg: str


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
            groups = {"before": _column(first, key), "after": _column(last, key)}
            if all(groups.values()):
                frame = Frame(f"{key} of held-out answers", unit, "share of answers")
                caption = f"{len(first)} answers before, {len(last)} after."
                found.append(Figure(f"{key} of held-out answers", caption, charts.distributions(frame, groups)))
    return found


@dataclass(frozen=True)
class Section:
    """The curves of one section of the registry."""

    name: str
    figures: list[Figure]
    is_open: bool


def sections(stage: StageFolder) -> list[Section]:
    """A curve for each metric, by section; two points, which the table of results has too, open no section."""
    found: dict[str, list[Figure]] = defaultdict(list)
    longest: dict[str, int] = defaultdict(int)
    axis = axis_of(stage.name)
    for key in stage.logged():
        points, entry = stage.series(key), known(key)
        if entry.section in _ELSEWHERE or not points or len(points) == 1 < len(stage.rows):
            continue
        svg = charts.curves(Frame(key, axis, entry.unit or key.split("/")[-1]), {key: points})
        found[entry.section].append(Figure(key, entry.meaning + _remarks(stage, key), svg))
        longest[entry.section] = max(longest[entry.section], len(points))
    opening = {name for name in found if name in _ALWAYS_OPEN or (name == "Evaluation" and longest[name] > 2)}
    return [Section(name, figures, name in opening) for name, figures in found.items()]


def axis_of(stage: str) -> str:
    """What the steps of a stage are called."""
    return _STEP.get(stage, "step")


def smoothing(points: charts.Points) -> str:
    """How a curve was smoothed, for its caption; empty where it was not."""
    width = charts.window(points)
    return f". Smoothed over about {width} points; what was logged is faint" if width else ""


def _remarks(stage: StageFolder, key: str) -> str:
    gaps, remark = stage.gaps(key), smoothing(stage.series(key))
    return remark + (f". Not finite at {axis_of(stage.name)} {', '.join(map(str, gaps[:5]))}." if gaps else "")


def cost(stage: StageFolder) -> list[Figure]:
    """Where time and memory went."""
    axis, found = axis_of(stage.name), []
    phases = {key.split("/")[1]: stage.series(key) for key in stage.logged() if key.startswith("timing_s/")}
    phases.pop("step", None)
    if phases:
        frame = Frame(f"Time of {stage.name}", axis, "seconds")
        found.append(Figure("Time", f"Seconds in each phase of every {axis}.", charts.stacked(frame, phases)))
    speed = stage.series("perf/tokens_per_second")
    if speed:
        frame = Frame(f"Throughput of {stage.name}", axis, "tokens/s")
        found.append(
            Figure("Throughput", f"Tokens per second, all ranks{smoothing(speed)}.", charts.curves(frame, {"": speed}))
        )
    memory = _memory(stage)
    if memory:
        frame = Frame(f"Memory of {stage.name}", "GB", "")
        caption = "Highest memory of the first rank in each phase, as planned before the run and as measured."
        found.append(Figure("Memory", caption, charts.bars(frame, memory)))
    return found


def known(key: str) -> Metric:
    """What the registry says of a metric; of one that it does not know (another version wrote it), its name."""
    try:
        return metric(key)
    except ValueError:
        return Metric("Other", "", (), f"{key}: not a metric of this version")


def _memory(stage: StageFolder) -> dict[str, dict[str, float]]:
    """GB planned and measured, by phase and place."""
    found: dict[str, dict[str, float]] = {}
    for phase, places in stage.planned.items():
        for place in ("device", "host"):
            measured = stage.summary.get(f"memory/{phase}_{place}_bytes")
            planned = places.get(place)
            if planned:
                bars = {"planned": planned / 1e9, **({} if measured is None else {"measured": measured / 1e9})}
                found[f"{phase} ({place})"] = bars
    return found


def _column(rows: list[Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows if is_number(row.get(key))]
