"""A JSONL file that only grows, survives a kill, and can be taken back to an earlier step.

Each row is one line, and is with the operating system when `append` returns. Beside it: what every reader of rows
needs, such as grouping them by step. Left out: what the rows mean.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from rlhf.runtime.atomic_files import writing

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
R = TypeVar("R", bound=Row)


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite number; a whole number too large for a float counts as infinite."""
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return is_numeric and abs(value) <= sys.float_info.max


def by_step(rows: Iterable[R]) -> dict[int, list[R]]:
    """Group rows by their step."""
    steps: dict[int, list[R]] = {}
    for row in rows:
        steps.setdefault(row["step"], []).append(row)
    return steps


def valid_json(value: Any) -> Any:
    """`value` with every NaN and infinity, which JSON does not have, replaced by None."""
    if isinstance(value, Mapping):
        return {str(key): valid_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [valid_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonlLog:
    """The rows of one file, each a JSON object. Creating a `JsonlLog` touches nothing, so anyone may read."""

    def __init__(self, path: Path, *, steps: bool = True) -> None:
        """Rows of `path`, which have an integer `step` unless `steps` is False."""
        self.path = path
        self._steps = steps

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; NaN and infinity become null. Raises RunError when the disk is full."""
        line = json.dumps(valid_json(row), ensure_ascii=False, allow_nan=False)
        # backslashreplace: a lone surrogate has no UTF-8, but its backslash form is valid JSON.
        data = (line + "\n").encode("utf-8", errors="backslashreplace")
        with writing(self.path), self.path.open("ab") as file:
            file.write(data)

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows, oldest first; none if the file does not exist.

        Raises:
            ValueError: a line is damaged.
        """
        rows = []
        for number, line in enumerate(self._lines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or (self._steps and not isinstance(row.get("step"), int)):
                raise ValueError(f"{self.path}:{number} is not a JSON row; remove that line.")
            rows.append(row)
        return rows

    def repair(self) -> None:
        """Drop a last line that a kill left half written, with a warning, so that rows can be appended.

        Raises:
            ValueError: another line is damaged.
        """
        torn = self.path.stat().st_size - sum(map(len, self._lines())) if self.path.exists() else 0
        if torn:
            logger.warning("%s: dropped the last line, which was half written (%d bytes)", self.path, torn)
            os.truncate(self.path, self.path.stat().st_size - torn)
        self.rows()

    def count(self) -> int:
        """Complete rows in the file."""
        return len(self._lines())

    def rewind(self, step: int) -> int:
        """Delete the rows after `step` (-1: all) and return how many are left.

        The file is replaced at once or not at all.
        """
        if not self.path.exists():
            return 0
        left = [line for line, row in zip(self._lines(), self.rows(), strict=True) if row["step"] <= step]
        shorter = self.path.with_name(self.path.name + ".tmp")
        with writing(self.path):
            shorter.write_bytes(b"".join(left))
            shorter.replace(self.path)
        return len(left)

    def _lines(self) -> list[bytes]:
        """Complete lines; what follows the last newline is still being written, or was cut by a kill."""
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        return [line + b"\n" for line in lines]
