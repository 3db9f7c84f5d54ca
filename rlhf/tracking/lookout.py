"""Says, while a stage runs, each sign that it goes wrong: once, as soon as it shows.

Left out: what counts as a sign (`watch.py`).
"""

from __future__ import annotations

from typing import Any

from rlhf.tracking.journal import Journal
from rlhf.tracking.watch import ENTROPY, Sign, signs


class Lookout:
    """Looks at one stage; what it has said it does not say again."""

    def __init__(self, metrics: Journal, samples: Journal) -> None:
        """Look at what these files hold and will hold."""
        self._metrics, self._samples = metrics, samples
        self._said: set[str] = set()
        self._first: dict[str, Any] | None = None

    def look(self, row: dict[str, Any], *, evaluated: bool) -> list[Sign]:
        """The signs that are new with `row`.

        Between evaluations only the row and the first one are compared: a step costs the same however long the stage.
        """
        rows = self._metrics.rows() if evaluated else [*self._beginning(), row]
        found = signs(rows, self._samples.rows() if evaluated else [])
        fresh = [sign for sign in found if sign.name not in self._said]
        self._said.update(sign.name for sign in fresh)
        return fresh

    def _beginning(self) -> list[dict[str, Any]]:
        """The row with the first entropy, from the file, where a resumed stage finds it too."""
        if self._first is None:
            self._first = next((row for row in self._metrics.rows() if ENTROPY in row), None)
        return [] if self._first is None else [self._first]
