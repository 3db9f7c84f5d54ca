"""Many runs on one page: the settings in which they differ, what each stage reached, and their curves on common axes.

Of most runs only small files are read, so that a thousand of them take seconds; curves are drawn for the first ones.
Left out: everything about one run alone (see its own report).
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
from rlhf.tracking.report.run_folder import FolderReader, holds_run, numbers_in, read_stage
from rlhf.tracking.text_table import number

INDEX = "index.html"
_ALWAYS_DIFFER = ("name", "output_dir", "hydra")  # settings


@dataclass(frozen=True)
class RunLine:
    """The line of one run."""

    name: str
    report: str | None
    """Address of its report, relative to the index; None if there is none."""
    finished: list[str]
    started: list[str]
    settings: dict[str, str]
    """Its configuration by dotted name."""
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
    results = dict.fromkeys(name for line in lines for name in line.results)
    content = render(
        "index.html.jinja",
        lines=lines,
        differing=_differing([line.settings for line in lines]),
        shown={name: known(name.split(" ")[1]).meaning for name in results if _is_compared(name.split(" ")[1])},
        figures=list(_overlays(drawn)) if len(lines) > 1 else [],
        drawn=len(drawn),
        strokes=charts.LINES,
        title=folder.resolve().name,
    )
    path = folder / INDEX
    path.write_text(content, encoding="utf-8")
    return path


def _line(run: Path, folder: Path) -> RunLine:
    name, reader = str(run.relative_to(folder)), FolderReader(run)
    settings = _settings(reader)
    started = [stage for stage in FOLDERS if (run / stage).is_dir()]
    after = {stage: numbers_in(reader.mapping(f"{stage}/stage.json", required=False).get("after")) for stage in started}
    return RunLine(
        name,
        report=f"{name}/{REPORT}" if (run / REPORT).exists() else None,
        finished=[stage for stage in started if after[stage]],
        started=[stage for stage in started if not after[stage]],
        settings=settings,
        results={f"{stage} {key}": number(value) for stage in started for key, value in after[stage].items()},
        note="; ".join(reader.notes),
    )


def _settings(reader: FolderReader) -> dict[str, str]:
    """The run's configuration by dotted name, with its output folder replaced by `OUTPUT`."""
    try:
        content = yaml.load(reader.text("config.yaml"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        reader.notes.append(f"config.yaml is not YAML ({error}).")
        return {}
    tree = content if isinstance(content, dict) else {}
    own = str(tree.get("output_dir") or "\0")
    flat = _flat({name: value for name, value in tree.items() if name not in _ALWAYS_DIFFER}, "")
    return {name: value.replace(own, "OUTPUT") for name, value in flat}


def _flat(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _differing(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """The settings that have different values in the runs that have them.

    Settings that always differ together, such as `seed` and what is taken from it, are one, under the shortest name.

    Returns:
        All names of each, by that one.
    """
    together: dict[tuple[str | None, ...], list[str]] = defaultdict(list)
    for name in dict.fromkeys(name for found in settings for name in found):
        values = tuple(found.get(name) for found in settings)
        if len({value for value in values if value is not None}) > 1:
            together[values].append(name)
    return {min(names, key=lambda name: (name.count("."), len(name))): names for names in together.values()}


def _is_compared(key: str) -> bool:
    """True for headlines of the registry, gold metrics, and the KL that they cost."""
    return known(key).headline or key.startswith("gold/") or key == "eval/kl"


def _overlays(runs: Mapping[str, Path]) -> Iterator[Figure]:
    """A chart for each metric that two runs or more have a curve of, with the runs in the order of the table."""
    for stage in FOLDERS:
        stages = {name: read_stage(FolderReader(run), stage) for name, run in runs.items()}
        for key in dict.fromkeys(key for found in stages.values() for key in found.logged() if _is_compared(key)):
            curves = {name: found.series(key) for name, found in stages.items()}
            if sum(len(points) > 1 for points in curves.values()) < 2:
                continue
            entry, title = known(key), f"{stage} {key}"
            frame = charts.Frame(title, axis_of(stage), entry.unit or key.split("/")[-1])
            caption = entry.meaning + smoothing(max(curves.values(), key=len))
            yield Figure(title, caption, charts.curves(frame, curves, legend=False))
