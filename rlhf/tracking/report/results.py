"""Held-out results before and after each stage, how sure the change is, and whether it is for the better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf.algorithms.intervals import Interval, share_change, wilson
from rlhf.tracking.answer_statistics import COLUMNS, by_step, change, with_ends
from rlhf.tracking.report.figures import known
from rlhf.tracking.report.run_folder import StageFolder
from rlhf.tracking.text_table import number


@dataclass(frozen=True)
class Headline:
    """One line of the table at the top."""

    stage: str
    metric: str
    before: str
    after: str
    change: str
    """With its 95% interval; empty where only means are known."""
    mark: str
    """better, worse, unclear, or nothing where neither direction is; without an interval, it goes by the means."""
    unit: str
    meaning: str


def headlines(stage: StageFolder) -> Iterator[Headline]:
    """Every held-out metric of a stage."""
    for key in dict.fromkeys([*stage.before, *stage.after]):
        entry, before, after = known(key), stage.before.get(key), stage.after.get(key)
        found = None if before is None or after is None else _change(stage, key)
        shift = 0.0 if before is None or after is None else after - before
        low, high = (shift, shift) if found is None else (found.low, found.high)
        yield Headline(
            stage=stage.name,
            metric=key,
            before="–" if before is None else number(before),
            after="–" if after is None else number(after),
            change="" if found is None else with_ends(found.mean, found.low, high=found.high),
            mark=_mark(low, high, better=entry.better) if shift else "",
            unit=entry.unit,
            meaning=entry.meaning,
        )


def _mark(low: float, high: float, *, better: int) -> str:
    """What a change between `low` and `high` is."""
    if not better:
        return ""
    if low <= 0 <= high:
        return "unclear"
    return "better" if low * better > 0 else "worse"


def _change(stage: StageFolder, key: str) -> Interval | None:
    """By prompt in PPO; of the reward model's accuracy, as of a share of its pairs."""
    answers = by_step(stage.samples)
    if len(answers) > 1:
        return change(answers[min(answers)], answers[max(answers)], key=COLUMNS.get(key, key))
    pairs = stage.after.get("eval/pairs")
    if key == "eval/accuracy" and pairs:
        return share_change(*(wilson(found[key] * pairs, int(pairs)) for found in (stage.before, stage.after)))
    return None
