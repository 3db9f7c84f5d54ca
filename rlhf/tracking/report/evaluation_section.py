"""What `stage=eval` has left in a run's folder, as the report shows it.

Every comparison is a section: tables, how sure and how right the reward model is, and answers side by side. Left out:
what the tables say (`rlhf/tracking/evaluation_tables.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.tracking.answer_statistics import is_number
from rlhf.tracking.evaluation_tables import FOLDER, RESULTS, SAMPLES, Table, tables
from rlhf.tracking.report import charts
from rlhf.tracking.report.reading import Reader, Row
from rlhf.tracking.text_table import number

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


def read_evaluations(reader: Reader) -> list[Evaluation]:
    """All comparisons of a run, the one without a name first; what cannot be read is noted by the reader."""
    root = reader.folder / FOLDER
    places = ["", *sorted(path.parent.name for path in root.glob(f"*/{RESULTS}"))]
    found = [name for name in places if (root / name / RESULTS).is_file()]
    evaluations = (_evaluation(reader, name) for name in found)
    return [evaluation for evaluation in evaluations if evaluation is not None]


def _evaluation(reader: Reader, name: str) -> Evaluation | None:
    place = f"{FOLDER}/{name}/" if name else f"{FOLDER}/"
    content = reader.mapping(place + RESULTS)
    if not content:
        return None
    rows = reader.objects(place + SAMPLES)
    shown = tables(content, meanings=True)
    return Evaluation(
        name, shown, _diagram(content, name), [_sample(row) for row in rows[:MOST_SAMPLES]], sample_count=len(rows)
    )


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


def _sample(row: Row) -> Sample:
    sides = {side: row[side] for side in ("model", "baseline") if isinstance(row.get(side), Mapping)}
    judged = row.get("preferences")
    return Sample(
        prompt=str(row.get("prompt", "")),
        answers={side: str(said.get("response", "")) for side, said in sides.items()},
        numbers={side: _numbers(said) for side, said in sides.items()},
        preferences=_numbers(judged) if isinstance(judged, Mapping) else {},
    )


def _numbers(row: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): number(float(value)) for key, value in row.items() if is_number(value)}
