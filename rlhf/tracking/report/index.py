"""Many runs on one page: the settings in which they differ, what each stage reached, and their curves on common axes.

Of most runs only the small files are read, so that a thousand of them take seconds; curves are drawn of the first ones.
Left out: everything that concerns one run alone (its own report has it).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.run_config import FOLDERS
from rlhf.tracking.report import charts
from rlhf.tracking.report.figures import Figure, axis_of, known, smoothing
from rlhf.tracking.report.page import REPORT, render
from rlhf.tracking.report.reading import Reader, holds_run
from rlhf.tracking.report.run_folder import StageFolder, read_outcome, read_stage
from rlhf.tracking.text_table import number

INDEX = "index.html"
_OF_THE_RUN = ("name", "output_dir", "hydra")  # settings in which runs always differ


@dataclass(frozen=True)
class Line:
    """One run."""

    name: str
    report: str | None
    """Address of its report, relative to the index; None where none was written."""
    finished: list[str]
    started: list[str]
    settings: dict[str, str]
    """Its configuration, by dotted name."""
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
    drawn = {line.name: run for line, run in zip(lines[: charts.DISTINCT], runs, strict=False)}
    content = render(
        "index.html.jinja",
        lines=lines,
        differing=_differing([line.settings for line in lines]),
        shown=_columns(lines),
        figures=list(_overlays(drawn)) if len(lines) > 1 else [],
        drawn=len(drawn),
        strokes=charts.LINES,
        title=folder.resolve().name,
    )
    path = folder / INDEX
    path.write_text(content, encoding="utf-8")
    return path


def _line(run: Path, folder: Path) -> Line:
    outcomes = {stage: read_outcome(run / stage) for stage in FOLDERS if (run / stage).is_dir()}
    finished = [stage for stage, outcome in outcomes.items() if outcome.after]
    name, reader = str(run.relative_to(folder)), Reader(run)
    settings = _settings(reader)
    return Line(
        name,
        report=f"{name}/{REPORT}" if (run / REPORT).exists() else None,
        finished=finished,
        started=[stage for stage in outcomes if stage not in finished],
        settings=settings,
        results={f"{stage} {key}": number(value) for stage in finished for key, value in outcomes[stage].after.items()},
        note="; ".join(filter(None, [*reader.notes, *(outcome.note for outcome in outcomes.values())])),
    )


def _settings(reader: Reader) -> dict[str, str]:
    """The run's configuration by dotted name, with its own folder under the name that all runs have for it."""
    try:
        content = yaml.load(reader.text("config.yaml"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        reader.notes.append(f"config.yaml is not YAML ({error}).")
        return {}
    tree = content if isinstance(content, dict) else {}
    flat = {name: value for name, value in _flat(tree, "") if name.split(".")[0] not in _OF_THE_RUN}
    own = str(tree.get("output_dir") or "\0")
    return {name: value.replace(own, "OUTPUT") for name, value in flat.items()}


def _flat(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _differing(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The settings of which runs that have them have different values.

    Settings that always differ together, as `seed` and what is taken from it do, are one, under the shortest name.

    Returns:
        All names of each, by that one.
    """
    together: dict[tuple[str | None, ...], list[str]] = defaultdict(list)
    for name in dict.fromkeys(name for found in settings for name in found):
        values = tuple(found.get(name) for found in settings)
        if len({value for value in values if value is not None}) > 1:
            together[values].append(name)
    return {min(names, key=lambda name: (name.count("."), len(name))): names for names in together.values()}


def _columns(lines: list[Line]) -> dict[str, str]:
    """The results that are shown, `STAGE KEY`, with what they mean."""
    found = dict.fromkeys(name for line in lines for name in line.results)
    return {name: known(name.split(" ")[1]).meaning for name in found if _is_compared(name.split(" ")[1])}


def _is_compared(key: str) -> bool:
    """Headlines of the registry, gold metrics, and what they have cost."""
    return known(key).headline or key.startswith("gold/") or key == "eval/kl"


def _overlays(runs: Mapping[str, Path]) -> Iterator[Figure]:
    """A chart for each metric that two runs or more have a curve of, with the runs in the order of the table."""
    for stage in FOLDERS:
        records = {name: read_stage(run, stage) for name, run in runs.items()}
        for key in dict.fromkeys(key for record in records.values() for key in record.logged() if _is_compared(key)):
            yield from _overlay(records, key, stage=stage)


def _overlay(records: Mapping[str, StageFolder], key: str, *, stage: str) -> Iterator[Figure]:
    curves = {name: record.series(key) for name, record in records.items()}
    if sum(len(points) > 1 for points in curves.values()) < 2:
        return
    entry, title = known(key), f"{stage} {key}"
    frame = charts.Frame(title, axis_of(stage), entry.unit or key.split("/")[-1])
    longest = max(curves.values(), key=len)
    yield Figure(title, entry.meaning + smoothing(longest), charts.curves(frame, curves, legend=False))
