"""What was looked for in a run: what was wrong and when, what was not, and what could not be looked for.

Left out: what is looked for, and how (`rlhf/tracking/watch.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.tracking.report.run_folder import StageFolder
from rlhf.tracking.watch import CHECKS, State, Verdict, history


@dataclass(frozen=True)
class Look:
    """All checks of one stage."""

    stage: str
    wrong: list[Verdict]
    fine: list[str]
    """What may be said of the stage."""
    unchecked: dict[str, list[str]]
    """What may not, by the reason."""


def look_at(stage: StageFolder) -> Look:
    """Every check of `stage`, over all that it has logged."""
    verdicts = history(stage.name, stage.rows, samples=stage.samples, total_steps=stage.total_steps)
    unchecked: dict[str, list[str]] = defaultdict(list)
    for found in _with(State.unchecked, verdicts):
        unchecked[found.text].append(_claim(found))
    fine = [_claim(found) for found in _with(State.fine, verdicts)]
    return Look(stage.name, _with(State.wrong, verdicts), fine, dict(unchecked))


def when(found: Verdict) -> str:
    """When something was wrong."""
    if found.holds and found.first == found.last:
        return f"At step {found.first}."
    if found.holds:
        return f"First at step {found.first}, and still so when last looked at (step {found.last})."
    return f"First at step {found.first}, last at step {found.last}, and no longer so after that."


def _with(state: State, verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [found for found in verdicts if found.state is state]


def _claim(found: Verdict) -> str:
    name, _, metric = found.name.partition(":")
    return CHECKS[name].fine.replace("gold metric", metric or "gold metric")
