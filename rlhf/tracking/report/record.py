"""What a run has left in its folder, read as far as it can be: what is missing or broken is said, the rest is used.

Left out: model weights and checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import STAGES
from rlhf.tracking import watch
from rlhf.tracking.evaluations import FOLDER
from rlhf.tracking.report.evaluation import Evaluation, read_evaluations

Row = dict[str, Any]

_LARGEST_STEP = 2**53  # above, a float skips steps


@dataclass(frozen=True)
class StageRecord:
    """What one stage has left."""

    name: str
    rows: list[Row]
    """Of `metrics.jsonl`, oldest first; each has an integer `step`."""
    samples: list[Row]
    """Of `samples.jsonl`."""
    before: dict[str, float]
    """Held-out metrics before training."""
    after: dict[str, float]
    """Those of the last evaluation."""
    summary: dict[str, float]
    planned: dict[str, dict[str, float]]
    """Bytes by phase and place."""
    is_finished: bool

    def series(self, key: str) -> list[tuple[int, float]]:
        """Steps and values of a metric, where it was logged and finite."""
        return watch.series(self.rows, key)

    def gaps(self, key: str) -> list[int]:
        """Steps at which a metric was not finite."""
        return [row["step"] for row in self.rows if key in row and not watch.is_number(row[key])]

    def logged(self) -> list[str]:
        """The metrics that were logged, in the order of their first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row if "/" in key))


@dataclass(frozen=True)
class RunRecord:
    """What a run has left."""

    folder: Path
    stages: list[StageRecord]
    config: str
    """The resolved configuration, YAML."""
    plan: str
    """The memory plan, text."""
    starts: list[Row]
    """Of `origin.jsonl`: command, machine and versions of every start, oldest first."""
    notes: list[str] = field(default_factory=list)
    """What is missing or could not be read."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """Of `stage=eval`."""

    @property
    def name(self) -> str:
        """What the run is called; of a stage by itself, with the stage."""
        return f"{self.folder.parent.name}/{self.folder.name}" if _is_stage(self.folder) else self.folder.name

    def stage(self, name: str) -> StageRecord | None:
        """A stage, None where it has not begun."""
        return next((stage for stage in self.stages if stage.name == name), None)


def read_run(folder: Path) -> RunRecord:
    """Everything that a report shows of the run in `folder`, or of one stage where `folder` is that stage's.

    Raises:
        ValueError: there is no such folder, or no stage has begun in it.
    """
    folder = folder.resolve()
    if not can_report(folder):
        raise ValueError(
            f"{folder}: no run is there. Expected a folder with sft/, reward/, ppo/ or eval/, such as outputs/RUN, or "
            "one of these."
        )
    whole, names = (folder.parent, (folder.name,)) if _is_stage(folder) else (folder, STAGES)
    reader = _Reader(whole)
    begun = [name for name in names if (whole / name).is_dir()]
    plans = reader.mapping("plan.json", required=bool(begun))
    return RunRecord(
        folder,
        [reader.stage(name, planned=plans.get(name)) for name in begun],
        config=reader.text("config.yaml", required=bool(begun)) or reader.text("eval/config.yaml", required=False),
        plan=reader.text("plan.txt", required=bool(begun)),
        starts=reader.objects("origin.jsonl"),
        notes=reader.notes,
        evaluations=read_evaluations(folder, notes=reader.notes),
    )


@dataclass(frozen=True)
class Outcome:
    """What a stage came to, from its small files alone."""

    after: dict[str, float]
    """Held-out metrics after training; none while it runs."""
    note: str
    """What could not be read."""


def holds_run(folder: Path) -> bool:
    """Whether a stage has begun in `folder`, or something was evaluated."""
    return any((folder / stage).is_dir() for stage in (*STAGES, FOLDER))


def can_report(folder: Path) -> bool:
    """Whether there is something to report of `folder`: it is that of a run, or of a stage."""
    return holds_run(folder) or _is_stage(folder)


def _is_stage(folder: Path) -> bool:
    return folder.name in STAGES and (folder / "metrics.jsonl").exists()


def read_outcome(folder: Path) -> Outcome:
    """What the stage in `folder` came to."""
    reader = _Reader(folder)
    record = reader.mapping("stage.json", required=False)
    return Outcome(_numbers(record.get("after")), "; ".join(f"{folder.name}/{note}" for note in reader.notes))


class _Reader:
    """Reads files of one folder, and notes what cannot be read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.notes: list[str] = []

    def stage(self, name: str, *, planned: Any) -> StageRecord:
        record = self.mapping(f"{name}/stage.json", required=False)
        rows = self.rows(f"{name}/metrics.jsonl")
        before = _numbers(record.get("before")) or _evaluation(rows, first=True)
        return StageRecord(
            name,
            rows,
            samples=self.rows(f"{name}/samples.jsonl", required=name == "ppo"),
            before=before,
            after=_numbers(record.get("after")) or _evaluation(rows, first=False),
            summary=_numbers(self.mapping(f"{name}/summary.json", required=bool(record))),
            planned={phase: _numbers(places) for phase, places in planned.items()} if isinstance(planned, dict) else {},
            is_finished=bool(record),
        )

    def text(self, name: str, *, required: bool = True) -> str:
        return self._read(name, required=required)

    def mapping(self, name: str, *, required: bool = True) -> dict[str, Any]:
        text = self._read(name, required=required)
        try:
            content = json.loads(text or "{}")
        except json.JSONDecodeError as error:
            self.notes.append(f"{name} is not JSON ({error}); it was left out.")
            return {}
        return content if isinstance(content, dict) else {}

    def rows(self, name: str, *, required: bool = True) -> list[Row]:
        """The good rows, in the order of the file: those with a step."""
        return self._lines(name, required=required, what="rows with a step", is_good=_has_step)

    def objects(self, name: str) -> list[Row]:
        """The good lines of a file whose rows have no step."""
        return self._lines(name, required=True, what="rows", is_good=lambda _: True)

    def _lines(self, name: str, *, required: bool, what: str, is_good: Callable[[Row], bool]) -> list[Row]:
        rows, broken = [], []
        for number, line in enumerate(self._read(name, required=required).split("\n"), start=1):
            row = _row(line)
            if row is not None and is_good(row):
                rows.append(row)
            elif line.strip():
                broken.append(str(number))
        if broken:
            shown = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
            self.notes.append(f"{name}: {len(broken)} lines are no {what} ({shown}); they were left out.")
        return rows

    def _read(self, name: str, *, required: bool) -> str:
        try:
            return (self._folder / name).read_text(encoding="utf-8", errors="backslashreplace")
        except FileNotFoundError:
            if required:
                self.notes.append(f"{name} is missing.")
        except OSError as error:
            self.notes.append(f"{name} cannot be read ({error.strerror}).")
        return ""


def _row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _has_step(row: Row) -> bool:
    step = row.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and abs(step) < _LARGEST_STEP


def _numbers(content: Any) -> dict[str, float]:
    items = content.items() if isinstance(content, dict) else ()
    return {str(key): float(value) for key, value in items if watch.is_number(value)}


def _evaluation(rows: list[Row], *, first: bool) -> dict[str, float]:
    """The first or last evaluation of a stage that is still running."""
    found = [row for row in rows if any(key.startswith("eval/") for key in row)]
    row = found[0 if first else -1] if found else {}
    return _numbers({key: value for key, value in row.items() if key.startswith(("eval/", "gold/"))})
