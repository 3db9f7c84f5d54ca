"""Problems of a stage: reported once each while it trains, and listed by the report afterwards.

Both run the table of checks over the recorded rows, so terminal and page agree. See also: `checks.py`, the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

from rlhf.tracking.answer_statistics import Row, by_step
from rlhf.tracking.checks import CHECKS, CheckState, Finding, Seen, run_checks
from rlhf.tracking.jsonl_log import JsonlLog


class Alerts:
    """Finds the problems of a running stage; each is reported once."""

    def __init__(self, metrics: JsonlLog, samples: JsonlLog, *, total_steps: int) -> None:
        """Catch up with the rows that an interrupted stage left in these files."""
        self._seen, self._reported = Seen(total_steps), set[str]()
        answers = by_step(samples.rows())
        for row in metrics.rows():
            self._reported |= _problems(run_checks(row, self._seen, answers=answers.get(row["step"], []))).keys()

    def check(self, row: Row, answers: Sequence[Row], *, is_recorded: bool) -> dict[str, str]:
        """Return the problems that are new with `row` and the answers of its evaluation, as texts by name.

        Later rows are compared with this one only if it is recorded, or will be because of new problems. So the report,
        which has the recorded rows alone, finds the same.
        """
        seen = copy(self._seen)  # its dicts are shared, but only evaluations change them, and those are always recorded
        found = _problems(run_checks(row, seen, answers=answers))
        new = {name: text for name, text in found.items() if name not in self._reported}
        self._reported |= found.keys()
        if is_recorded or new:
            self._seen = seen
        return new


def _problems(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.text for name, finding in found.items() if finding.state is CheckState.wrong}


@dataclass(frozen=True)
class CheckResult:
    """The result of a check over a whole stage. A problem stays once found, with its newest text."""

    name: str
    """A key of `CHECKS`; with a result for each gold metric, `parted:METRIC`."""
    state: CheckState
    text: str = ""
    first: int = 0
    """Step at which it was first wrong."""
    last: int = 0
    """Step at which it was last wrong."""
    holds: bool = False
    """Whether it was still wrong when last checked."""

    def after(self, finding: Finding, step: int) -> CheckResult:
        """The result with one more finding."""
        if finding.state is CheckState.wrong:
            first = self.first if self.state is CheckState.wrong else step
            return CheckResult(self.name, CheckState.wrong, finding.text, first=first, last=step, holds=True)
        if finding.state is CheckState.unchecked:
            return replace(self, text=finding.text) if self.state is CheckState.unchecked else self
        return replace(self, holds=False) if self.state is CheckState.wrong else CheckResult(self.name, finding.state)


def check_history(
    stage: str, rows: Sequence[Row], *, samples: Sequence[Row], total_steps: float = math.inf
) -> list[CheckResult]:
    """The result of every check of `stage` over all that it has logged.

    Args:
        stage: sft, reward, ppo or another policy stage.
        rows: of `metrics.jsonl`, oldest first.
        samples: of `samples.jsonl`: the answers of every evaluation to the same prompts, in the same order.
        total_steps: of the stage, as far as they are known.
    """
    seen, answers = Seen(total_steps), by_step(samples)
    checks = {name: check for name, check in CHECKS.items() if stage in check.stages}
    results = {name: CheckResult(name, CheckState.unchecked, check.needs) for name, check in checks.items()}
    for row in rows:
        for name, found in run_checks(row, seen, answers=answers.get(row["step"], [])).items():
            earlier = results.get(name, CheckResult(name, CheckState.unchecked))
            results[name] = earlier.after(found, row["step"])
    by_metric = {name.partition(":")[0] for name in results if ":" in name}
    return [found for name, found in results.items() if name not in by_metric and name.partition(":")[0] in checks]
