"""Many runs on one page: a line for each, with what its last stage reached.

Only the small files of a run are read, so that a thousand of them take seconds. Left out: curves (each run's own report
has them).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf.config import STAGES
from rlhf.tracking.report.figures import known
from rlhf.tracking.report.page import REPORT, render
from rlhf.tracking.report.record import holds_run, read_outcome
from rlhf.tracking.table import number

INDEX = "index.html"


@dataclass(frozen=True)
class Line:
    """One run."""

    name: str
    report: str | None
    """Address of its report, relative to the index; None where none was written."""
    finished: list[str]
    started: list[str]
    results: dict[str, str]
    """Held-out metrics after training, by `STAGE KEY`."""
    note: str


def write_index(folder: Path) -> Path:
    """Write `index.html` over the runs in `folder`, one or two levels below it.

    Raises:
        ValueError: there is no run in it.
    """
    runs = sorted({run for pattern in ("*", "*/*") for run in folder.glob(pattern) if holds_run(run)})
    if not runs:
        raise ValueError(f"{folder}: no run is there, and none in a folder of it. Expected a folder such as outputs.")
    lines = [_line(run, folder) for run in runs]
    path = folder / INDEX
    path.write_text(
        render("index.html.jinja", lines=lines, shown=_columns(lines), title=folder.resolve().name), encoding="utf-8"
    )
    return path


def _line(run: Path, folder: Path) -> Line:
    outcomes = {stage: read_outcome(run / stage) for stage in STAGES if (run / stage).is_dir()}
    finished = [stage for stage, outcome in outcomes.items() if outcome.after]
    name = str(run.relative_to(folder))
    return Line(
        name,
        report=f"{name}/{REPORT}" if (run / REPORT).exists() else None,
        finished=finished,
        started=[stage for stage in outcomes if stage not in finished],
        results={f"{stage} {key}": number(value) for stage in finished for key, value in outcomes[stage].after.items()},
        note="; ".join(outcome.note for outcome in outcomes.values() if outcome.note),
    )


def _columns(lines: list[Line]) -> dict[str, str]:
    """The results that are shown, `STAGE KEY`, with what they mean: headlines of the registry, and gold metrics."""
    found = dict.fromkeys(name for line in lines for name in line.results)
    known_ones = {name: known(name.split(" ")[1]) for name in found}
    return {name: entry.meaning for name, entry in known_ones.items() if entry.headline or " gold/" in name}
