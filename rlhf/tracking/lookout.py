"""Says, while a stage runs, each sign that it goes wrong: once, as soon as it shows.

Left out: what counts as a sign (`watch.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from rlhf.tracking.answer_statistics import Row, by_step
from rlhf.tracking.jsonl_log import Journal
from rlhf.tracking.watch import Finding, State, Watcher


class Lookout:
    """Looks at one stage; what it has said it does not say again."""

    def __init__(self, metrics: Journal, samples: Journal, *, total_steps: int) -> None:
        """Catch up with what an interrupted stage has left in these files."""
        self._watcher, self._said = Watcher(total_steps), set[str]()
        answers = by_step(samples.rows())
        for row in metrics.rows():
            found = self._watcher.look(row, answers.get(row["step"], []))
            self._said |= {finding.name for finding in found if finding.state is State.wrong}

    def look(self, row: Row, answers: Sequence[Row], *, is_recorded: bool) -> list[Finding]:
        """The signs that are new with `row`, and with the answers of its evaluation if it is that of one.

        What follows is compared with the row only if it is recorded, or new signs are why it will be: a report, which
        has the recorded rows alone, then says the same.
        """
        watcher = copy(self._watcher)  # evaluations, of which more is kept than a copy has, are always recorded
        found = [found for found in watcher.look(row, answers) if found.state is State.wrong]
        fresh = [finding for finding in found if finding.name not in self._said]
        self._said.update(finding.name for finding in fresh)
        if is_recorded or fresh:
            self._watcher = watcher
        return fresh
