"""A JSONL file that only grows, survives a kill, and can be taken back to an earlier step.

Every row is one line and is on its way to the disk when `append` returns. Left out: what the rows mean.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def valid_json(value: Any) -> Any:
    """`value` with every NaN and infinity, which JSON does not have, replaced by None."""
    if isinstance(value, Mapping):
        return {str(key): valid_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [valid_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Journal:
    """Rows of one file, each with an integer `step`. Making a Journal touches nothing, so that anyone may read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; NaN and infinity become null."""
        line = json.dumps(valid_json(row), ensure_ascii=False, allow_nan=False)
        # A lone surrogate cannot be UTF-8, but its backslash form is what JSON calls it.
        with self.path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(line + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows, oldest first; none when nothing was written."""
        return [self._row(line, number) for number, line in enumerate(self._lines(), start=1)]

    def repair(self) -> None:
        """Drop a last line that a kill left half written, so that the next row is not glued to it."""
        if self.path.exists():
            os.truncate(self.path, sum(map(len, self._lines())))

    def rewind(self, step: int) -> None:
        """Forget the rows after `step`; -1 forgets all. The file is replaced at once or not at all."""
        if not self.path.exists():
            return
        lines = zip(self._lines(), self.rows(), strict=True)
        shorter = self.path.with_name(self.path.name + ".tmp")
        shorter.write_bytes(b"".join(line for line, row in lines if row["step"] <= step))
        shorter.replace(self.path)

    def _lines(self) -> list[bytes]:
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        return [line for line in lines if line.endswith(b"\n")]

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}:{number} is not a JSON row ({error}); remove that line.") from error
        return row
