"""A JSONL file that only grows, survives a kill, and can be taken back to an earlier step.

Every row is one line and is on its way to the disk when `append` returns. Left out: what the rows mean.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.runtime.atomic_files import writing

logger = logging.getLogger(__name__)


def valid_json(value: Any) -> Any:
    """`value` with every NaN and infinity, which JSON does not have, replaced by None."""
    if isinstance(value, Mapping):
        return {str(key): valid_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [valid_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """Rows of one file, each a JSON object. Making a Journal touches nothing, so that anyone may read."""

    def __init__(self, path: Path, *, steps: bool = True) -> None:
        """Rows of `path`, which have an integer `step` unless `steps` is False."""
        self.path = path
        self._steps = steps

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; NaN and infinity become null. Raises RunError where the disk is full."""
        line = json.dumps(valid_json(row), ensure_ascii=False, allow_nan=False)
        # A lone surrogate cannot be UTF-8, but its backslash form is what JSON calls it.
        with (
            writing(self.path),
            self.path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
        ):
            file.write(line + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows, oldest first; none when nothing was written.

        Raises:
            ValueError: a line is damaged.
        """
        rows = []
        for number, line in enumerate(self._lines(), start=1):
            row = self._row(line)
            if row is None:
                raise ValueError(f"{self.path}:{number} is not a JSON row; remove that line.")
            rows.append(row)
        return rows

    def repair(self) -> None:
        """Drop what is no row, so that the next one can follow: the file as it was is kept beside, and both are said.

        A last line that a kill has left half written is dropped without a copy.
        """
        if not self.path.exists():
            return
        lines = self._lines()
        good = [line for line in lines if self._row(line) is not None]
        if len(good) < len(lines):
            kept = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
            with writing(kept):
                shutil.copyfile(self.path, kept)
            broken = len(lines) - len(good)
            logger.warning("%s: %d lines are no rows and are left out; %s has them", self.path, broken, kept)
            self._replace(good)
        elif size := self.path.stat().st_size - sum(map(len, lines)):
            logger.warning("%s: its last line was half written (%d bytes), and is dropped", self.path, size)
            os.truncate(self.path, sum(map(len, lines)))

    def count(self) -> int:
        """Complete rows in the file."""
        return len(self._lines())

    def rewind(self, step: int) -> int:
        """Forget the rows after `step`, and count those that are left; -1 forgets all.

        The file is replaced at once or not at all.
        """
        if not self.path.exists():
            return 0
        left = [line for line, row in zip(self._lines(), self.rows(), strict=True) if row["step"] <= step]
        self._replace(left)
        return len(left)

    def _replace(self, lines: list[bytes]) -> None:
        shorter = self.path.with_name(self.path.name + ".tmp")
        with writing(self.path):
            shorter.write_bytes(b"".join(lines))
            shorter.replace(self.path)

    def _lines(self) -> list[bytes]:
        """Complete lines; what follows the last one is on its way, or half written."""
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        return [line + b"\n" for line in lines]

    def _row(self, line: bytes) -> dict[str, Any] | None:
        """The row in `line`; None where it is damaged."""
        try:
            row = json.loads(line)
        except ValueError:
            return None
        is_row = isinstance(row, dict) and (not self._steps or isinstance(row.get("step"), int))
        return row if is_row else None
