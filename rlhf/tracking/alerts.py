"""Runs the checks of a stage over its rows: a problem is reported once while it trains, and listed by the report.

See also: `checks.py`, the table of checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass

from rlhf.tracking.answer_statistics import SMALLEST_SAMPLE
from rlhf.tracking.checks import CHECKS, Check, Finding, Seen, gold_metrics
from rlhf.tracking.jsonl_log import Row, by_step


@dataclass
class CheckResult:
    """The result of a check over all rows so far. A problem stays once found, with its newest text."""

    is_wrong: bool | None = None
    """None if it could not be checked."""
    text: str = ""
    """The problem, or why it was not checked."""
    first: int = 0
    """Step at which it was first wrong."""
    last: int = 0
    """Step at which it was last wrong."""
    holds: bool = False
    """Whether it was still wrong when last checked."""

    def add(self, finding: Finding, step: int) -> None:
        """Take one more finding into account."""
        if finding.is_wrong:
            self.first = self.first if self.is_wrong else step
            self.is_wrong, self.text, self.last = True, finding.text, step
        elif not self.is_wrong and (finding.is_wrong is False or self.is_wrong is None):
            self.is_wrong, self.text = finding.is_wrong, finding.text
        if finding.is_wrong is not None:
            self.holds = finding.is_wrong


class StageChecks:
    """Runs the checks of a stage over its rows."""

    def __init__(
        self, stage: str, rows: Iterable[Row], *, samples: Sequence[Row], total_steps: float = math.inf
    ) -> None:
        """Check what was recorded: rows of `metrics.jsonl`, oldest first, and rows of `samples.jsonl`."""
        self._checks = {name: check for name, check in CHECKS.items() if stage in check.stages}
        self._seen = Seen(total_steps)
        self._results = {name: CheckResult(text=check.needs) for name, check in self._checks.items()}
        answers = by_step(samples)
        for row in rows:
            self.add(row, answers.get(row["step"], ()))

    @property
    def results(self) -> dict[str, CheckResult]:
        """The result of each check by its name; with a result for each gold metric, by `parted:METRIC`."""
        by_metric = {name.partition(":")[0] for name in self._results if ":" in name}
        return {name: result for name, result in self._results.items() if name not in by_metric}

    def add(self, row: Row, answers: Sequence[Row], *, is_recorded: bool = True) -> dict[str, str]:
        """Check one more row of `metrics.jsonl`, and return the problems that are new, as texts by name.

        Later rows are compared with this one only if it is recorded, or will be because of new problems. So the report,
        which has the recorded rows alone, finds the same.

        Args:
            row: metrics of a step.
            answers: to the held-out prompts at that step; they count if the row is that of an evaluation.
            is_recorded: whether the row is recorded even if nothing is wrong.
        """
        seen = copy(self._seen)  # its dicts are shared, but only evaluations change them, and those are always recorded
        seen.answers = answers
        found = {
            f"{name}:{finding.metric}" if finding.metric else name: finding
            for name, check in self._checks.items()
            for finding in _findings(check, row, seen=seen)
        }
        if "eval/score" in row and len(answers) >= SMALLEST_SAMPLE:
            seen.first_answers = seen.first_answers or answers
        results = {name: self._results.get(name, CheckResult()) for name in found}
        new = {name: found[name].text for name in found if found[name].is_wrong and not results[name].is_wrong}
        if is_recorded or new:
            self._seen = seen
            self._results |= results
            for name, result in results.items():
                result.add(found[name], row["step"])
        return new


def _findings(check: Check, row: Row, *, seen: Seen) -> Iterable[Finding]:
    """The findings of a check in a row, or why it cannot be made."""
    if not check.evaluations:
        return check.look(row, seen)
    if "eval/score" not in row:
        return ()
    if check.needs_gold and not gold_metrics(row):
        return [Finding(None, "data.gold names no metric that no model was trained on")]
    count = len(seen.answers)
    if count < SMALLEST_SAMPLE:
        why = f"there are answers to {count} held-out prompts, and fewer than {SMALLEST_SAMPLE} tell nothing"
        return [Finding(None, why)]
    return check.look(row, seen) if check.evaluations == 1 or seen.first_answers else ()
