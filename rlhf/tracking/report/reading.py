"""Files of a run, read as far as they can be: what is missing or broken is said, the rest is used.

Left out: what the files mean (`run_folder.py`, `evaluation.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.config.run_config import FOLDERS
from rlhf.tracking.evaluation_tables import FOLDER

Row = dict[str, Any]

_LARGEST_STEP = 2**53  # above, a float skips steps


def holds_run(folder: Path) -> bool:
    """Whether a stage has begun in `folder`, or something was evaluated."""
    return any((folder / stage).is_dir() for stage in (*FOLDERS, FOLDER))


def can_report(folder: Path) -> bool:
    """Whether there is something to report of `folder`: it is that of a run, or of a stage."""
    return holds_run(folder) or is_stage(folder)


def is_stage(folder: Path) -> bool:
    """Whether `folder` is that of a stage."""
    return folder.name in FOLDERS and (folder / "metrics.jsonl").exists()


class Reader:
    """Reads files of one folder; what cannot be read is noted, and left out."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""
        self.folder = folder
        self.notes: list[str] = []
        """What is missing or could not be read, a sentence each."""

    def text(self, name: str, *, required: bool = True) -> str:
        """The whole file; empty where there is none, which is noted if it is `required`."""
        return self._read(name, required=required) or ""

    def mapping(self, name: str, *, required: bool = True) -> dict[str, Any]:
        """A JSON object."""
        text = self._read(name, required=required)
        try:
            content = {} if text is None else json.loads(text)
        except json.JSONDecodeError as error:
            self.notes.append(f"{name} is not JSON ({error}); it was left out.")
            return {}
        if not isinstance(content, dict):
            self.notes.append(f"{name} is no JSON object; it was left out.")
            return {}
        return content

    def rows(self, name: str, *, required: bool = True) -> list[Row]:
        """The good rows, in the order of the file: those with a step."""
        return self._lines(name, required=required, what="rows with a step", is_good=_has_step)

    def objects(self, name: str) -> list[Row]:
        """The good lines of a file whose rows have no step."""
        return self._lines(name, required=True, what="rows", is_good=lambda _: True)

    def _lines(self, name: str, *, required: bool, what: str, is_good: Callable[[Row], bool]) -> list[Row]:
        rows, broken = [], []
        for number, line in enumerate(self.text(name, required=required).split("\n"), start=1):
            row = _row(line)
            if row is not None and is_good(row):
                rows.append(row)
            elif line.strip():
                broken.append(str(number))
        if broken:
            shown = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
            self.notes.append(f"{name}: {len(broken)} lines are no {what} ({shown}); they were left out.")
        return rows

    def _read(self, name: str, *, required: bool) -> str | None:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="backslashreplace")
        except FileNotFoundError:
            if required:
                self.notes.append(f"{name} is missing.")
        except OSError as error:
            self.notes.append(f"{name} cannot be read ({error.strerror}).")
        return None


def _row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _has_step(row: Row) -> bool:
    step = row.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and abs(step) < _LARGEST_STEP
