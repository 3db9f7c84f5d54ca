"""Reads what a run left in its folder, as far as it can be read: problems are noted, everything else is used.

Left out: model weights and checkpoints.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.ppo_config import POLICIES
from rlhf.config.run_config import FOLDERS
from rlhf.evaluation.result_tables import FOLDER, RESULTS, SAMPLES
from rlhf.tracking.jsonl_log import Row, is_number

_LARGEST_STEP = 2**53  # above, a float skips steps


def holds_run(folder: Path) -> bool:
    """True if a stage or an evaluation has begun in `folder`."""
    return any((folder / stage).is_dir() for stage in (*FOLDERS, FOLDER))


def is_stage(folder: Path) -> bool:
    """True if `folder` is that of a stage."""
    return folder.name in FOLDERS and (folder / "metrics.jsonl").exists()


def can_report(folder: Path) -> bool:
    """True if `folder` is that of a run or of a stage, of which there can be a report."""
    return holds_run(folder) or is_stage(folder)


class FolderReader:
    """Reads files of one folder. What cannot be read is left out, with a note."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        """Files that are missing or could not be read, a sentence each."""

    def text(self, name: str, *, required: bool = True) -> str | None:
        """The whole file; None if there is none, which is noted if it is `required`."""
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="backslashreplace")
        except FileNotFoundError:
            if required:
                self.notes.append(f"{name} is missing.")
        except OSError as error:
            self.notes.append(f"{name} cannot be read ({error.strerror}).")
        return None

    def mapping(self, name: str, *, required: bool = True) -> dict[str, Any]:
        """A JSON object; empty if there is none."""
        text = self.text(name, required=required)
        try:
            content = {} if text is None else json.loads(text)
        except ValueError as error:
            self.notes.append(f"{name} is not JSON ({error}); it was left out.")
            return {}
        if not isinstance(content, dict):
            self.notes.append(f"{name} is not a JSON object; it was left out.")
            return {}
        return content

    def rows(self, name: str, *, required: bool = True, steps: bool = True) -> list[Row]:
        """The good lines of a JSONL file, in their order; with `steps`, those with a step."""
        rows, broken = [], []
        for number, line in enumerate((self.text(name, required=required) or "").split("\n"), start=1):
            row = _row(line, steps=steps)
            if row is not None:
                rows.append(row)
            elif line.strip():
                broken.append(str(number))
        if broken:
            shown = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
            what = "rows with a step" if steps else "rows"
            self.notes.append(f"{name}: {len(broken)} lines are not {what} ({shown}); they were left out.")
        return rows


def _row(line: str, *, steps: bool) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    has_step = isinstance(step, int) and not isinstance(step, bool) and abs(step) < _LARGEST_STEP
    return row if isinstance(row, dict) and (has_step or not steps) else None


@dataclass(frozen=True)
class StageFolder:
    """The files of one stage."""

    name: str
    rows: list[Row]
    """Rows of `metrics.jsonl`, one for each `step`, in their order."""
    samples: list[Row]
    """Rows of `samples.jsonl`."""
    before: dict[str, float]
    """Held-out metrics before training."""
    after: dict[str, float]
    """Held-out metrics of the last evaluation."""
    summary: dict[str, float]
    planned: dict[str, dict[str, float]]
    """Bytes by phase and place."""
    is_finished: bool

    @property
    def total_steps(self) -> float:
        """Steps of the stage; infinity before its last one."""
        last = float(self.rows[-1]["step"]) if self.is_finished and self.rows else math.inf
        return self.summary.get("steps", last)

    def series(self, key: str) -> list[tuple[int, float]]:
        """Steps and values of a metric, where it was logged and finite."""
        return [(row["step"], float(row[key])) for row in self.rows if is_number(row.get(key))]

    def gaps(self, key: str) -> list[int]:
        """Steps at which a metric was not finite."""
        return [row["step"] for row in self.rows if key in row and not is_number(row[key])]

    def logged(self) -> list[str]:
        """The metrics that were logged, in the order of their first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row if "/" in key))


@dataclass(frozen=True)
class EvaluationFolder:
    """The files of one comparison of `stage=eval`."""

    name: str
    results: dict[str, Any]
    samples: list[Row]


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    folder: Path
    stages: list[StageFolder]
    config: str
    """The resolved configuration, YAML."""
    plan: str
    """The memory plan, text."""
    starts: list[Row]
    """Rows of `origin.jsonl`: command, machine and versions of every start, oldest first."""
    evaluations: list[EvaluationFolder]
    """The one without a name first."""
    notes: list[str]
    """Files that are missing or could not be read, a sentence each."""

    @property
    def name(self) -> str:
        """The name of the run; of a stage by itself, `RUN/STAGE`."""
        return f"{self.folder.parent.name}/{self.folder.name}" if is_stage(self.folder) else self.folder.name

    @property
    def policy(self) -> StageFolder | None:
        """The stage that trained the newest policy: ppo, grpo, ..."""
        return next((stage for stage in reversed(self.stages) if stage.name in POLICIES), None)


def read_run(folder: Path) -> RunFolder:
    """Read everything that a report shows of the run in `folder`, or of one stage if `folder` is that stage's.

    Raises:
        ValueError: there is no such folder, or no stage has begun in it.
    """
    folder = folder.resolve()
    if not can_report(folder):
        raise ValueError(
            f"{folder}: no run is there. Expected a folder with sft/, reward/, ppo/ (grpo/, ...) or eval/, such as "
            "outputs/RUN, or one of these."
        )
    whole, names = (folder.parent, (folder.name,)) if is_stage(folder) else (folder, FOLDERS)
    reader = FolderReader(whole)
    begun = [name for name in names if (whole / name).is_dir()]
    begun.sort(key=lambda name: (whole / name).stat().st_mtime if name in POLICIES else 0.0)
    plans = reader.mapping("plan.json", required=bool(begun))
    return RunFolder(
        folder,
        [read_stage(reader, name, planned=plans.get(name)) for name in begun],
        config=reader.text("config.yaml", required=bool(begun))
        or reader.text("eval/config.yaml", required=False)
        or "",
        plan=reader.text("plan.txt", required=bool(begun)) or "",
        starts=reader.rows("origin.jsonl", steps=False),
        evaluations=[] if is_stage(folder) else _read_evaluations(reader),
        notes=reader.notes,
    )


def read_stage(reader: FolderReader, name: str, *, planned: Any = None) -> StageFolder:
    """Read one stage of a run; `planned` is its part of `plan.json`."""
    record = reader.mapping(f"{name}/stage.json", required=False)
    rows = _one_row_each(reader.rows(f"{name}/metrics.jsonl"))
    evaluations = [row for row in rows if any(key.startswith("eval/") for key in row)] or [{}]
    return StageFolder(
        name,
        rows,
        samples=reader.rows(f"{name}/samples.jsonl", required=name in POLICIES),
        before=numbers_in(record.get("before")) or _held_out(evaluations[0]),
        after=numbers_in(record.get("after")) or _held_out(evaluations[-1]),
        summary=numbers_in(reader.mapping(f"{name}/summary.json", required=bool(record))),
        planned={phase: numbers_in(places) for phase, places in planned.items()} if isinstance(planned, dict) else {},
        is_finished=bool(record),
    )


def _one_row_each(rows: list[Row]) -> list[Row]:
    """One row for each step, in their order: of a value that was logged twice, the later one."""
    steps: dict[int, dict[str, Any]] = {}
    for row in rows:
        steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def _read_evaluations(reader: FolderReader) -> list[EvaluationFolder]:
    root = reader.folder / FOLDER
    found = []
    for file in [root / RESULTS, *sorted(root.glob(f"*/{RESULTS}"))]:
        place = file.parent.relative_to(reader.folder).as_posix()
        results = reader.mapping(f"{place}/{RESULTS}", required=False)
        if results:
            name = "" if file.parent == root else file.parent.name
            found.append(EvaluationFolder(name, results, reader.rows(f"{place}/{SAMPLES}", steps=False)))
    return found


def numbers_in(content: Any) -> dict[str, float]:
    """The finite numbers of a JSON object by name; none if it is something else."""
    items = content.items() if isinstance(content, dict) else ()
    return {str(key): float(value) for key, value in items if is_number(value)}


def _held_out(row: Row) -> dict[str, float]:
    return {key: value for key, value in numbers_in(row).items() if key.startswith(("eval/", "gold/"))}
