"""Chooses the charts of a stage and of an evaluation: what is compared stands in one chart.

See also: `charts.py`, which draws them, and `chart_table.py`, which says which metrics share a chart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rlhf.config.ppo_config import POLICIES
from rlhf.tracking.chart_table import LOOK_FOR, TITLES
from rlhf.tracking.jsonl_log import Row, by_step, is_number
from rlhf.tracking.metric_registry import METRICS, Metric, registered
from rlhf.tracking.report.charts import (
    OTHER,
    PHASES,
    Chart,
    Points,
    bars,
    curves,
    histograms,
    reward_against_kl,
    smoothing,
    stacked,
    timelines,
)
from rlhf.tracking.report.run_folder import StageFolder

_ROUNDING = 1e-5  # a curve that moves by less of its value says nothing
_SPEED = "perf/tokens_per_second"


@dataclass
class ChartSection:
    """The curves of one section of the registry."""

    name: str
    charts: list[Chart] = field(default_factory=list)
    constant: dict[str, float] = field(default_factory=dict)
    """Metrics that never changed, which need no curve."""
    is_open: bool = False


def overview(stage: StageFolder) -> list[Chart]:
    """PPO at a glance: reward against KL, and the answers before and after."""
    costs = dict(stage.series("eval/kl"))
    keys = [key for key in stage.logged() if key == "eval/score" or key.startswith("gold/")]
    paths = {key: [(costs[step], value) for step, value in stage.series(key) if step in costs] for key in keys}
    paths = {key: points for key, points in paths.items() if points}
    found = [reward_against_kl(paths)] if paths else []
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
                found.append(histograms(f"{key} of held-out answers", caption, x=unit, groups=groups))
    return found


def sections(stage: StageFolder) -> list[ChartSection]:
    """Curves by section, those of one kind in one chart; two points, which the table of results has too, open none."""
    found: dict[str, ChartSection] = {}
    groups: dict[tuple[str, str], dict[str, Points]] = defaultdict(dict)
    order = {name: place for place, name in enumerate(METRICS)}
    for key in sorted(stage.logged(), key=lambda key: order.get(_registered(key), len(order))):
        points, section = stage.series(key), known(key).section
        is_drawn_by_cost = section in ("Throughput", "Memory")
        if is_drawn_by_cost or not points or len(points) == 1 < len(stage.rows):
            continue
        groups[section, _chart_of(key, stage)][key] = points
        place = found.setdefault(section, ChartSection(section))
        place.is_open |= section in ("Training", "Objective") or (section == "Evaluation" and len(points) > 2)
    for (section, title), series in groups.items():
        if all(_is_constant(key, stage) for key in series):
            found[section].constant |= {key: points[0][1] for key, points in series.items()}
        else:
            found[section].charts.append(_of_one_kind(stage, title, series=series))
    return list(found.values())


def _registered(key: str) -> str:
    """The name under which the registry has `key`, or `key` itself where another version logged it."""
    try:
        return registered(key)
    except ValueError:
        return key


def cost(stage: StageFolder) -> list[Chart]:
    """The charts of time, throughput and memory."""
    found = [*_times(stage), *_ranks(stage)]
    keys = [key for key in stage.logged() if key.startswith(_SPEED)]
    speed = {key.removeprefix(_SPEED).strip("/") or "whole": stage.series(key) for key in keys}
    speed = {phase: points for phase, points in speed.items() if points}
    if speed:
        caption = (
            "Tokens per second of all ranks: of a phase, the tokens that it worked on over its seconds; of the whole, "
            f"tokens over seconds without evaluating and saving{smoothing(*speed.values())}."
        )
        found.append(curves(f"Throughput of {stage.name}", caption, x=axis_of(stage.name), y="tokens/s", series=speed))
    memory = {}
    for phase, places in stage.planned.items():
        for place in ("device", "host"):
            measured, planned = stage.summary.get(f"memory/{phase}_{place}_bytes"), places.get(place)
            if planned:
                sizes = {"planned": planned / 1e9, **({} if measured is None else {"measured": measured / 1e9})}
                memory[f"{phase} ({place})"] = sizes
    if memory:
        caption = "Highest memory of the first rank in each phase, as planned before the run and as measured."
        found.append(bars(f"Memory of {stage.name}", caption, x="GB", groups=memory))
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
    return METRICS.get(_registered(key)) or Metric("Other", "", (), f"{key}: not a metric of this version")


def phases_of(row: Row) -> dict[str, float]:
    """The seconds of a step by phase, which add up to it: parts stand for the phase that they are parts of.

    What is left of such a phase has its name, and what is left of the step is `OTHER`.
    """
    seconds = {
        key.removeprefix("timing_s/"): float(value)
        for key, value in row.items()
        if key.startswith("timing_s/") and is_number(value)
    }
    step, found = seconds.pop("step", None), defaultdict[str, float](float)
    for name, value in seconds.items():
        phase, _, part = name.partition("/")
        found[part or phase] += value
        if part:
            found[phase] -= value
    whole = sum(value for name, value in seconds.items() if "/" not in name)
    rest = {} if step is None else {OTHER: step - whole}
    # Two clocks may differ in the last digits.
    return {name: max(value, 0.0) for name, value in sorted((found | rest).items(), key=_place)}


def _place(layer: tuple[str, Any]) -> int:
    """The place of a phase in a step, by its name; the rest of the step comes last."""
    name = layer[0]
    return PHASES.index(name) if name in PHASES else len(PHASES) + (name == OTHER)


def _times(stage: StageFolder) -> list[Chart]:
    """Where the seconds went: in every step, and in the usual, the slowest and the last one."""
    axis, steps = axis_of(stage.name), {row["step"]: phases_of(row) for row in stage.rows}
    steps = {step: seconds for step, seconds in steps.items() if seconds and step > 0}  # 0 opens the models
    if not steps:
        return []
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for step, seconds in steps.items():
        for name, value in seconds.items():
            found[name][step] = value
    layers = dict(sorted(found.items(), key=_place))
    about = f"Seconds of the first rank. Saving counts for the {axis} after it; `{OTHER}` is in no measured phase."
    by_length = sorted(steps, key=lambda step: sum(steps[step].values()))
    chosen = {"usual": by_length[(len(by_length) - 1) // 2], "slowest": by_length[-1], "last": max(steps)}
    if len(steps) == 1:
        return [timelines(f"Time of {stage.name}", about, layers=layers, steps={f"{axis} {max(steps)}": max(steps)})]
    single = {f"{name}: {step}": step for name, step in chosen.items()}
    caption = f"Phase after phase, in the {axis} of median length, in the slowest and in the last one."
    return [
        stacked(f"Time of {stage.name}", about, x=axis, layers=layers),
        timelines(f"One {axis} of {stage.name}", caption, layers=layers, steps=single),
    ]


def _ranks(stage: StageFolder) -> list[Chart]:
    """How long the fastest and the slowest rank take for each phase; none of a run on one rank."""
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for which in ("fastest", "slowest"):
        start = f"perf/{which}_rank_s/"
        for key in stage.logged():
            seconds = [value for step, value in stage.series(key) if step > 0]
            if key.startswith(start) and seconds:
                groups[key.removeprefix(start)][which] = median(seconds)
    if not groups:
        return []
    caption = (
        f"Median over the {axis_of(stage.name)}s. The fast ones wait for the slowest at the next collective; a wait "
        "inside a phase, as in the backward passes of training, is in the time of both."
    )
    ordered = dict(sorted(groups.items(), key=lambda group: _place((group[0].split("/")[-1], None))))
    return [bars(f"Ranks of {stage.name}", caption, x="seconds", groups=ordered)]


def _weights_of(key: str, stage: StageFolder) -> str:
    """The metric of the weights themselves where `key` is that of their moving average, or `key`."""
    name = key.removeprefix("ema/")
    return key if name == key else next((found for found in (f"eval/{name}", name) if stage.series(found)), key)


def _chart_of(key: str, stage: StageFolder) -> str:
    """The title of the chart of a metric; a moving average of the weights is drawn beside the weights themselves."""
    key = _weights_of(key, stage)
    return TITLES.get(_registered(key), key)


def _is_constant(key: str, stage: StageFolder) -> bool:
    values = [value for _, value in stage.series(key)]
    is_flat = max(values) - min(values) <= _ROUNDING * max(map(abs, values))
    return is_flat and len(stage.rows) > 1 and not stage.gaps(key)


def _of_one_kind(stage: StageFolder, title: str, *, series: Mapping[str, Points]) -> Chart:
    """The chart of metrics that are compared; a metric alone is titled by its key."""
    axis, keys, labels = axis_of(stage.name), list(series), labels_of(series, stage)
    title = title if len(keys) > 1 else keys[0]
    meanings = dict.fromkeys(known(_weights_of(key, stage)).meaning for key in keys)
    if title in LOOK_FOR and len(keys) > 1:
        about = LOOK_FOR[title]
    elif len(meanings) == 1:
        about = ". ".join(filter(None, [*meanings, LOOK_FOR.get(title)]))
    else:
        about = "; ".join(f"{label}: {known(key).meaning}" for label, key in zip(labels, keys, strict=True))
    caption = f"{about}{smoothing(*series.values())}."
    gaps = {label: stage.gaps(key) for label, key in zip(labels, keys, strict=True)}
    for key in keys:
        steps = ", ".join(map(str, stage.gaps(key)[:5]))
        caption += f" {key} was not finite at {axis} {steps}." if steps else ""
    unit = known(keys[0]).unit or ("" if len(keys) > 1 else keys[0].split("/")[-1])
    drawn = dict(zip(labels, series.values(), strict=True))
    return curves(title, caption, x=axis, y=unit, series=drawn, gaps=gaps)


def labels_of(keys: Iterable[str], stage: StageFolder) -> list[str]:
    """Short names of metrics in one chart: their keys without the words that all of them begin or end with."""
    weights = {key: _weights_of(key, stage) for key in keys}
    words = {key: key.split("/") for key in weights.values()}
    start, most = 0, min(map(len, words.values())) - 1
    while start < most and len({each[start] for each in words.values()}) == 1:
        start += 1
    end = 0
    while end < most - start and len({each[-1 - end] for each in words.values()}) == 1:
        end += 1
    short = {key: "/".join(each[start : len(each) - end]) for key, each in words.items()}
    return [short[own] if key == own else f"{short[own]}, moving average" for key, own in weights.items()]
