"""Which charts a stage has: what they show, over what, and in which unit.

Left out: how they are drawn (`charts.py`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from rlhf.tracking.metrics import Metric, metric
from rlhf.tracking.report import charts
from rlhf.tracking.report.charts import Frame
from rlhf.tracking.report.reading import Row
from rlhf.tracking.report.record import StageRecord
from rlhf.tracking.watch import by_step, is_number

_STEP = {"ppo": "iteration"}
_ELSEWHERE = ("Throughput", "Memory")  # sections that have charts of their own


@dataclass(frozen=True)
class Figure:
    """A chart and what stands over and under it."""

    title: str
    caption: str
    svg: str


def overview(stage: StageRecord) -> list[Figure]:
    """PPO at a glance: reward against KL, and the answers before and after."""
    found = []
    judges = [key for key in stage.logged() if key == "eval/score" or key.startswith("gold/")]
    costs = dict(stage.series("eval/kl"))
    paths = {key: [(costs[step], value) for step, value in stage.series(key) if step in costs] for key in judges}
    paths = {key: path for key, path in paths.items() if path}
    if paths:
        frame = Frame("Reward against KL", "KL to the reference, √nats per response", "mean over held-out prompts")
        caption = (
            "One point for each evaluation, joined in the order of training. Where the score goes on rising and a gold "
            "metric turns down, the policy pleases the reward model only (Gao et al. 2023)."
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


def sections(stage: StageRecord) -> dict[str, list[Figure]]:
    """A curve for each metric, by section of the registry."""
    found: dict[str, list[Figure]] = defaultdict(list)
    axis = _STEP.get(stage.name, "step")
    for key in stage.logged():
        points = stage.series(key)
        entry = known(key)
        if entry.section in _ELSEWHERE or not points:
            continue
        gaps = stage.gaps(key)
        caption = entry.meaning + (f". Not finite at {axis} {', '.join(map(str, gaps[:5]))}." if gaps else "")
        svg = charts.curves(Frame(key, axis, entry.unit or key.split("/")[-1]), {key: points})
        found[entry.section].append(Figure(key, caption, svg))
    return dict(found)


def cost(stage: StageRecord) -> list[Figure]:
    """Where time and memory went."""
    axis, found = _STEP.get(stage.name, "step"), []
    phases = {key.split("/")[1]: stage.series(key) for key in stage.logged() if key.startswith("timing_s/")}
    phases.pop("step", None)
    if phases:
        frame = Frame(f"Time of {stage.name}", axis, "seconds")
        found.append(Figure("Time", f"Seconds in each phase of every {axis}.", charts.stacked(frame, phases)))
    speed = stage.series("perf/tokens_per_second")
    if speed:
        frame = Frame(f"Throughput of {stage.name}", axis, "tokens/s")
        found.append(Figure("Throughput", "Tokens per second, all ranks.", charts.curves(frame, {"": speed})))
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


def _memory(stage: StageRecord) -> dict[str, dict[str, float]]:
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
