"""What `stage=eval` has left in a run's folder, as the report shows it.

Every comparison is a section: tables, how sure and how right the reward model is, and answers side by side. Files are
read as far as they can be. Left out: what the tables say (`rlhf/tracking/evaluations.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.tracking.evaluations import FOLDER, RESULTS, SAMPLES, Table, tables
from rlhf.tracking.report import charts
from rlhf.tracking.table import number
from rlhf.tracking.watch import is_number

MOST_SAMPLES = 50  # in the page; all are in samples.jsonl


@dataclass(frozen=True)
class Sample:
    """What was said to one prompt, and what came of it."""

    prompt: str
    answers: dict[str, str]
    """By side: `model`, and where there is one `against`."""
    numbers: dict[str, dict[str, str]]
    """Of each answer, by side and name."""
    preferences: dict[str, str]
    """Of each judge."""


@dataclass(frozen=True)
class Evaluation:
    """One comparison."""

    name: str
    tables: list[Table]
    calibration: str
    """The reliability diagram, SVG; empty where there are no pairs."""
    samples: list[Sample]
    sample_count: int
    """Of the file."""


def read_evaluations(folder: Path, *, notes: list[str]) -> list[Evaluation]:
    """All comparisons below a run's `folder`, the one without a name first; what cannot be read is put in `notes`."""
    found = [folder / FOLDER / RESULTS, *sorted((folder / FOLDER).glob(f"*/{RESULTS}"))]
    results = {path.parent: _mapping(path, notes) for path in found if path.is_file()}
    return [_evaluation(folder, place, content=content, notes=notes) for place, content in results.items() if content]


def _evaluation(folder: Path, place: Path, *, content: Mapping[str, Any], notes: list[str]) -> Evaluation:
    samples = list(_samples(place / SAMPLES, notes))
    name = "" if place.parent == folder else place.name
    shown = tables(content, meanings=True)
    return Evaluation(name, shown, _diagram(content, name), samples[:MOST_SAMPLES], sample_count=len(samples))


def _diagram(content: Mapping[str, Any], name: str) -> str:
    quality = content.get("reward_model")
    calibration = quality.get("calibration") if isinstance(quality, Mapping) else None
    bins = calibration.get("bins") if isinstance(calibration, Mapping) else None
    points = []
    for row in bins if isinstance(bins, list) else []:
        right = row.get("right") if isinstance(row, Mapping) else None
        pair = (row.get("confidence"), right.get("mean")) if isinstance(right, Mapping) else (None, None)
        if is_number(pair[0]) and is_number(pair[1]):
            points.append((float(pair[0]), float(pair[1])))
    if not points:
        return ""
    frame = charts.Frame(f"Calibration {name}".strip(), "confidence", "share that is right")
    return charts.curves(frame, {"reward model": points, "as sure as right": [(0.5, 0.5), (0.75, 0.75), (1.0, 1.0)]})


def _samples(path: Path, notes: list[str]) -> Iterator[Sample]:
    for line in _read(path, notes).split("\n"):
        row = _parsed(line)
        if not isinstance(row, Mapping):
            continue
        sides = {side: row[side] for side in ("model", "against") if isinstance(row.get(side), Mapping)}
        judged = row.get("preferences")
        yield Sample(
            prompt=str(row.get("prompt", "")),
            answers={side: str(said.get("response", "")) for side, said in sides.items()},
            numbers={side: _numbers(said) for side, said in sides.items()},
            preferences=_numbers(judged) if isinstance(judged, Mapping) else {},
        )


def _numbers(row: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): number(float(value)) for key, value in row.items() if is_number(value)}


def _mapping(path: Path, notes: list[str]) -> Mapping[str, Any]:
    content = _parsed(_read(path, notes))
    if not isinstance(content, Mapping):
        notes.append(f"{path.parent.name}/{path.name} is no JSON object; it was left out.")
        return {}
    return content


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _read(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        notes.append(f"{path.parent.name}/{path.name} cannot be read ({error.strerror}).")
        return ""
