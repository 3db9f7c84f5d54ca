"""Writes the pages: the report of a run or a stage, and the table of many runs.

A page is one HTML file that needs no network and no server, and only its own script can run in it. Text of models and
data sets is escaped by the template, and control characters are made visible.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlhf.algorithms.intervals import Interval, share_change, wilson
from rlhf.config.run_config import FOLDERS
from rlhf.evaluation.result_tables import tables
from rlhf.runtime.atomic_files import write_text
from rlhf.tracking.alerts import CheckResult, StageChecks
from rlhf.tracking.answer_statistics import change
from rlhf.tracking.checks import CHECKS
from rlhf.tracking.jsonl_log import Row, by_step, is_number
from rlhf.tracking.metric_registry import COLUMNS
from rlhf.tracking.report import stage_charts as charts
from rlhf.tracking.report.run_folder import (
    EvaluationFolder,
    FolderReader,
    RunFolder,
    StageFolder,
    holds_run,
    numbers_in,
    read_run,
)
from rlhf.tracking.text_table import number, printable_lines, with_ends

REPORT, INDEX = "report.html", "index.html"
MOST_SAMPLES = 200  # in the page; all are in samples.jsonl
MOST_COMPARED = 50  # of each evaluation; all are in its samples.jsonl


def write_report(folder: Path) -> Path:
    """Write `report.html` of the run in `folder`, complete or not at all.

    Raises:
        ValueError: no run is there.
    """
    write_text(folder / REPORT, page(read_run(folder)))
    return folder / REPORT


def page(run: RunFolder, *, refresh: int = 0) -> str:
    """The report as HTML; with `refresh`, browsers load it again after that many seconds."""
    script, policy = _part("page.js"), run.policy
    pairs = _pairs(policy) if policy else []
    return _render(
        "page.html.jinja",
        run=run,
        refresh=refresh,
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        headlines=[line for stage in run.stages for line in _results(stage)],
        checks={stage.name: _checks(stage) for stage in run.stages},
        overview=charts.overview(policy) if policy else [],
        sections={stage.name: charts.sections(stage) for stage in run.stages},
        cost={stage.name: charts.cost(stage) for stage in run.stages},
        evaluations=[_evaluation(found) for found in run.evaluations],
        pairs=pairs[:MOST_SAMPLES],
        pair_count=len(pairs),
        numbers=_numbers,
        diff=difference,
    )


def write_index(folder: Path) -> Path:
    """Write `index.html`, a table of the runs one or two levels below `folder` and their held-out results.

    How their settings differ is in their names, if a sweep has named them, and in W&B.

    Raises:
        ValueError: there is no run in it.
    """
    runs = sorted({run for pattern in ("*", "*/*") for run in folder.glob(pattern) if holds_run(run)})
    if not runs:
        raise ValueError(f"{folder}: no run is there, and none in a folder of it. Expected a folder such as outputs.")
    lines = [_run_line(run, folder) for run in runs]
    shown = {}
    for name in dict.fromkeys(name for line in lines for name in line["results"]):
        entry = charts.known(name.split(" ")[1])
        if entry.headline or " gold/" in name or name.endswith(" eval/kl"):
            shown[name] = entry.meaning
    content = _render("index.html.jinja", title=folder.resolve().name, lines=lines, shown=shown)
    write_text(folder / INDEX, content)
    return folder / INDEX


def _run_line(run: Path, folder: Path) -> dict[str, Any]:
    """One run of the index: its name and link, the stages it has finished and begun, and results by `STAGE KEY`."""
    name, reader = str(run.relative_to(folder)), FolderReader(run)
    stages = [stage for stage in FOLDERS if (run / stage).is_dir()]
    after = {stage: numbers_in(reader.mapping(f"{stage}/stage.json", required=False).get("after")) for stage in stages}
    return {
        "name": name,
        "report": f"{name}/{REPORT}" if (run / REPORT).exists() else None,
        "finished": [stage for stage in stages if after[stage]],
        "begun": [stage for stage in stages if not after[stage]],
        "results": {f"{stage} {key}": number(value) for stage in stages for key, value in after[stage].items()},
        "note": "; ".join(reader.notes),
    }


def _render(template: str, **content: Any) -> str:
    """Fill in a template; everything is escaped and in the style of all pages."""
    environment = Environment(loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"visible": visible, "numbers": _formatted, "short": number}
    return environment.get_template(template).render(style=Markup(_part("page.css")), **content)


def _part(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def visible(text: object) -> str:
    """`text` with every character that could hide or reorder text as an escape; lines stay lines."""
    return printable_lines(str(text))


def _results(stage: StageFolder) -> Iterator[dict[str, str]]:
    """The lines of the table of held-out results, each with the change and its 95% interval if that is known.

    `mark` is better, worse or unclear, and empty if neither direction is better. Without an interval it goes by the
    means.
    """
    for key in dict.fromkeys([*stage.before, *stage.after]):
        entry, before, after = charts.known(key), stage.before.get(key), stage.after.get(key)
        found, mark = None, ""
        if before is not None and after is not None:
            found = _change(stage, key)
            low, high = (after - before, after - before) if found is None else (found.low, found.high)
            if entry.better and after != before:
                mark = "unclear" if low <= 0 <= high else "better" if low * entry.better > 0 else "worse"
        yield {
            "stage": stage.name,
            "metric": key,
            "before": "–" if before is None else number(before),
            "after": "–" if after is None else number(after),
            "change": "" if found is None else with_ends(found.mean, found.low, high=found.high),
            "mark": mark,
            "unit": entry.unit,
            "meaning": entry.meaning,
        }


def _change(stage: StageFolder, key: str) -> Interval | None:
    """The change over training: by prompt in PPO; of the reward model's accuracy, as a share of its pairs."""
    answers = by_step(stage.samples)
    if len(answers) > 1:
        return change(answers[min(answers)], answers[max(answers)], key=COLUMNS.get(key, key))
    pairs = stage.after.get("eval/pairs")
    if key == "eval/accuracy" and pairs:
        return share_change(*(wilson(found[key] * pairs, int(pairs)) for found in (stage.before, stage.after)))
    return None


def _checks(stage: StageFolder) -> dict[str, Any]:
    """The results of all checks of a stage: `wrong`, `fine` (in words), and `unchecked` (in words, by the reason)."""
    checks = StageChecks(stage.name, stage.rows, samples=stage.samples, total_steps=stage.total_steps)
    wrong, fine, unchecked = [], [], defaultdict(list)
    for name, found in checks.results.items():
        check, _, metric = name.partition(":")
        claim = CHECKS[check].fine.replace("gold metric", metric or "gold metric")
        if found.is_wrong:
            wrong.append({"text": found.text, "when": _when(found)})
        elif found.is_wrong is None:
            unchecked[found.text].append(claim)
        else:
            fine.append(claim)
    return {"wrong": wrong, "fine": fine, "unchecked": dict(unchecked)}


def _when(found: CheckResult) -> str:
    if found.holds and found.first == found.last:
        return f"At step {found.first}."
    if found.holds:
        return f"First at step {found.first}, and still so when last looked at (step {found.last})."
    return f"First at step {found.first}, last at step {found.last}, and no longer so after that."


def _pairs(stage: StageFolder) -> list[dict[str, Any]]:
    """The first and the last answer to each held-out prompt, and by how much the score rose (0 if unknown)."""
    answers = by_step(stage.samples)
    if len(answers) < 2:
        return []
    pairs = []
    for before, after in zip(answers[min(answers)], answers[max(answers)], strict=False):
        if before.get("prompt") == after.get("prompt"):
            old, new = before.get("score"), after.get("score")
            gained = float(new) - float(old) if is_number(old) and is_number(new) else 0.0
            pairs.append({"prompt": str(after.get("prompt", "")), "before": before, "after": after, "gained": gained})
    return pairs


def _numbers(row: Row) -> Iterator[tuple[str, str]]:
    """Everything of an answer but the texts, by name."""
    for key, value in row.items():
        if key not in ("prompt", "response", "step"):
            yield key, number(value) if isinstance(value, float) else str(value)


def difference(before: str, after: str) -> Markup:
    """`after`, word by word: new words are marked, words that are gone are struck through."""
    old, new = before.split(), after.split()
    parts = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, came = visible(" ".join(old[i:j])), visible(" ".join(new[k:m]))
        if kind == "equal":
            parts.append(Markup("{}").format(came))
            continue
        if gone:
            parts.append(Markup("<del>{}</del>").format(gone))
        if came:
            parts.append(Markup("<ins>{}</ins>").format(came))
    return Markup(" ").join(parts)


def _evaluation(found: EvaluationFolder) -> dict[str, Any]:
    """One comparison of `stage=eval`: its tables, calibration, and answers side by side."""
    return {
        "name": found.name,
        "tables": tables(found.results, meanings=True),
        "calibration": charts.calibration(found.results, found.name),
        "samples": found.samples[:MOST_COMPARED],
        "sample_count": len(found.samples),
    }


def _formatted(content: Any) -> dict[str, str]:
    return {key: number(value) for key, value in numbers_in(content).items()}
