"""Outcomes of cases, kept in a file: an interrupted benchmark goes on where it was.

Left out: judging them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.zero_case import Case, Outcome

log = logging.getLogger(__name__)


class Records:
    """Outcomes by case and round."""

    def __init__(self, file: Path, *, runner: Callable[[Case], Outcome]) -> None:
        """Go on from `file`; `runner` measures what is not in it."""
        self._file, self._runner = file, runner
        self._known: dict[str, dict | None] = {}
        if file.exists():
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            self._known = {line["key"]: line["outcome"] for line in lines}

    def measure(self, case: Case, number: int) -> Outcome | None:
        """The outcome of a case in a round, measured if it is not known; None when the peer cannot run it.

        Raises:
            RuntimeError: our own run failed.
        """
        key = json.dumps([asdict(case), number], sort_keys=True)
        if key not in self._known:
            log.info("round %d: %s", number, case)
            try:
                self._keep(key, asdict(self._runner(case)))
            except RuntimeError as error:
                if case.contender != "deepspeed":
                    raise
                log.warning("%s", error)
                self._keep(key, None)
        known = self._known[key]
        return None if known is None else Outcome(**known)

    def _keep(self, key: str, outcome: dict | None) -> None:
        self._known[key] = outcome
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps({"key": key, "outcome": outcome}) + "\n")
