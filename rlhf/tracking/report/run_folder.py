"""What a run has left in its folder, read as far as it can be: what is missing or broken is said, the rest is used.

Left out: model weights and checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config.run_config import FOLDERS
from rlhf.config.stage_configs import POLICIES
from rlhf.tracking import answer_statistics as answers
from rlhf.tracking.report.evaluation_section import Evaluation, read_evaluations
from rlhf.tracking.report.reading import Reader, Row, can_report, is_stage


@dataclass(frozen=True)
class StageFolder:
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

    @property
    def total_steps(self) -> float:
        """Steps of the stage, infinity before its last one."""
        last = float(self.rows[-1]["step"]) if self.is_finished and self.rows else math.inf
        return self.summary.get("steps", last)

    def series(self, key: str) -> list[tuple[int, float]]:
        """Steps and values of a metric, where it was logged and finite."""
        return answers.series(self.rows, key)

    def gaps(self, key: str) -> list[int]:
        """Steps at which a metric was not finite."""
        return [row["step"] for row in self.rows if key in row and not answers.is_number(row[key])]

    def logged(self) -> list[str]:
        """The metrics that were logged, in the order of their first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row if "/" in key))


@dataclass(frozen=True)
class RunFolder:
    """What a run has left."""

    folder: Path
    stages: list[StageFolder]
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
        return f"{self.folder.parent.name}/{self.folder.name}" if is_stage(self.folder) else self.folder.name

    def stage(self, name: str) -> StageFolder | None:
        """A stage, None where it has not begun; for `ppo` the newest with that name or another of its kinds."""
        names = POLICIES if name == "ppo" else (name,)
        return next((stage for stage in reversed(self.stages) if stage.name in names), None)


def read_run(folder: Path) -> RunFolder:
    """Everything that a report shows of the run in `folder`, or of one stage where `folder` is that stage's.

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
    reader = Reader(whole)
    begun = [name for name in names if (whole / name).is_dir()]
    begun.sort(key=lambda name: (whole / name).stat().st_mtime if name in POLICIES else 0.0)
    plans = reader.mapping("plan.json", required=bool(begun))
    return RunFolder(
        folder,
        [_stage(reader, name, planned=plans.get(name)) for name in begun],
        config=reader.text("config.yaml", required=bool(begun)) or reader.text("eval/config.yaml", required=False),
        plan=reader.text("plan.txt", required=bool(begun)),
        starts=reader.objects("origin.jsonl"),
        evaluations=[] if is_stage(folder) else read_evaluations(reader),
        notes=reader.notes,
    )


@dataclass(frozen=True)
class Outcome:
    """What a stage came to, from its small files alone."""

    after: dict[str, float]
    """Held-out metrics after training; none while it runs."""
    note: str
    """What could not be read."""


def read_outcome(folder: Path) -> Outcome:
    """What the stage in `folder` came to."""
    reader = Reader(folder)
    record = reader.mapping("stage.json", required=False)
    return Outcome(_numbers(record.get("after")), "; ".join(f"{folder.name}/{note}" for note in reader.notes))


def read_stage(folder: Path, name: str) -> StageFolder:
    """One stage of the run in `folder`, whatever is missing or broken of it left out."""
    return _stage(Reader(folder), name, planned=None)


def _stage(reader: Reader, name: str, *, planned: Any) -> StageFolder:
    record = reader.mapping(f"{name}/stage.json", required=False)
    rows = reader.rows(f"{name}/metrics.jsonl")
    before = _numbers(record.get("before")) or _evaluation(rows, first=True)
    return StageFolder(
        name,
        rows,
        samples=reader.rows(f"{name}/samples.jsonl", required=name in POLICIES),
        before=before,
        after=_numbers(record.get("after")) or _evaluation(rows, first=False),
        summary=_numbers(reader.mapping(f"{name}/summary.json", required=bool(record))),
        planned={phase: _numbers(places) for phase, places in planned.items()} if isinstance(planned, dict) else {},
        is_finished=bool(record),
    )


def _numbers(content: Any) -> dict[str, float]:
    items = content.items() if isinstance(content, dict) else ()
    return {str(key): float(value) for key, value in items if answers.is_number(value)}


def _evaluation(rows: list[Row], *, first: bool) -> dict[str, float]:
    """The first or last evaluation of a stage that is still running."""
    found = [row for row in rows if any(key.startswith("eval/") for key in row)]
    row = found[0 if first else -1] if found else {}
    return _numbers({key: value for key, value in row.items() if key.startswith(("eval/", "gold/"))})
