"""One HTML file that shows a run: it needs no network and no server, and only its own script can run in it.

Text of models and data sets is escaped by the template, and control characters are made visible.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlhf.algorithms.intervals import Interval, share_change, wilson
from rlhf.evaluation.result_tables import tables
from rlhf.tracking.alerts import CheckResult, check_history
from rlhf.tracking.answer_statistics import COLUMNS, by_step, change, is_number, with_ends
from rlhf.tracking.checks import CHECKS, CheckState
from rlhf.tracking.report import figures
from rlhf.tracking.report.run_folder import EvaluationFolder, Row, RunFolder, StageFolder, numbers_in, read_run
from rlhf.tracking.text_table import number, printable_lines

REPORT = "report.html"
MOST_SAMPLES = 200  # in the page; all are in samples.jsonl
MOST_COMPARED = 50  # of each evaluation; all are in its samples.jsonl


def write_report(folder: Path) -> Path:
    """Write `report.html` of the run in `folder`, complete or not at all.

    Raises:
        ValueError: no run is there.
    """
    path = folder / REPORT
    complete = path.with_suffix(".tmp")
    complete.write_text(page(read_run(folder)), encoding="utf-8")
    complete.replace(path)
    return path


def page(run: RunFolder, *, refresh: int = 0) -> str:
    """The report as HTML; with `refresh`, browsers ask for it again after that many seconds."""
    script, policy = _part("page.js"), run.policy
    pairs = _pairs(policy) if policy else []
    return render(
        "page.html.jinja",
        run=run,
        refresh=refresh,
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        headlines=[line for stage in run.stages for line in _headlines(stage)],
        checks={stage.name: _checks(stage) for stage in run.stages},
        when=_when,
        overview=figures.overview(policy) if policy else [],
        sections={stage.name: figures.sections(stage) for stage in run.stages},
        cost={stage.name: figures.cost(stage) for stage in run.stages},
        evaluations=[_evaluation(found) for found in run.evaluations],
        pairs=pairs[:MOST_SAMPLES],
        pair_count=len(pairs),
        diff=difference,
    )


def render(template: str, **content: Any) -> str:
    """Fill in a template; everything is escaped and in the style of all pages."""
    environment = Environment(loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined)
    environment.filters["visible"] = visible
    return environment.get_template(template).render(style=Markup(_part("page.css")), **content)


def _part(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def visible(text: object) -> str:
    """`text` with every character that could hide or reorder text as an escape; lines stay lines."""
    return printable_lines(str(text))


@dataclass(frozen=True)
class ResultLine:
    """One line of the table of held-out results."""

    stage: str
    metric: str
    before: str
    after: str
    change: str
    """With its 95% interval; empty if only means are known."""
    mark: str
    """better, worse or unclear; empty if neither direction is better. Without an interval it goes by the means."""
    unit: str
    meaning: str


def _headlines(stage: StageFolder) -> Iterator[ResultLine]:
    for key in dict.fromkeys([*stage.before, *stage.after]):
        entry, before, after = figures.known(key), stage.before.get(key), stage.after.get(key)
        found, mark = None, ""
        if before is not None and after is not None:
            found = _change(stage, key)
            low, high = (after - before, after - before) if found is None else (found.low, found.high)
            if entry.better and after != before:
                mark = "unclear" if low <= 0 <= high else "better" if low * entry.better > 0 else "worse"
        yield ResultLine(
            stage=stage.name,
            metric=key,
            before="–" if before is None else number(before),
            after="–" if after is None else number(after),
            change="" if found is None else with_ends(found.mean, found.low, high=found.high),
            mark=mark,
            unit=entry.unit,
            meaning=entry.meaning,
        )


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
    results = check_history(stage.name, stage.rows, samples=stage.samples, total_steps=stage.total_steps)
    unchecked: dict[str, list[str]] = defaultdict(list)
    for found in results:
        if found.state is CheckState.unchecked:
            unchecked[found.text].append(_claim(found))
    return {
        "wrong": [found for found in results if found.state is CheckState.wrong],
        "fine": [_claim(found) for found in results if found.state is CheckState.fine],
        "unchecked": dict(unchecked),
    }


def _claim(found: CheckResult) -> str:
    """What holds if a check found nothing."""
    name, _, metric = found.name.partition(":")
    return CHECKS[name].fine.replace("gold metric", metric or "gold metric")


def _when(found: CheckResult) -> str:
    if found.holds and found.first == found.last:
        return f"At step {found.first}."
    if found.holds:
        return f"First at step {found.first}, and still so when last looked at (step {found.last})."
    return f"First at step {found.first}, last at step {found.last}, and no longer so after that."


@dataclass(frozen=True)
class AnswerPair:
    """The answers to a held-out prompt before and after training."""

    prompt: str
    before: Row
    after: Row

    @property
    def gained(self) -> float:
        """Change of the score; 0 if it is not known."""
        old, new = self.before.get("score"), self.after.get("score")
        return float(new) - float(old) if is_number(old) and is_number(new) else 0.0

    def numbers(self, row: Row) -> Iterator[tuple[str, str]]:
        """Everything but the texts, by name."""
        for key, value in row.items():
            if key not in ("prompt", "response", "step"):
                yield key, number(value) if isinstance(value, float) else str(value)


def _pairs(stage: StageFolder) -> list[AnswerPair]:
    """The first and the last answers to each prompt."""
    answers = by_step(stage.samples)
    if len(answers) < 2:
        return []
    first, last = answers[min(answers)], answers[max(answers)]
    return [
        AnswerPair(str(after.get("prompt", "")), before, after)
        for before, after in zip(first, last, strict=False)
        if before.get("prompt") == after.get("prompt")
    ]


def difference(before: str, after: str) -> Markup:
    """`after`, word by word: new words are marked, words that are gone are struck through."""
    old, new = before.split(), after.split()
    parts = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(Markup("{}").format(visible(" ".join(new[k:m]))))
            continue
        if i < j:
            parts.append(Markup("<del>{}</del>").format(visible(" ".join(old[i:j]))))
        if k < m:
            parts.append(Markup("<ins>{}</ins>").format(visible(" ".join(new[k:m]))))
    return Markup(" ").join(parts)


def _evaluation(found: EvaluationFolder) -> dict[str, Any]:
    """One comparison of `stage=eval`: its tables, calibration, and answers side by side."""
    return {
        "name": found.name,
        "tables": tables(found.results, meanings=True),
        "calibration": figures.calibration(found.results, found.name),
        "samples": [_compared(row) for row in found.samples[:MOST_COMPARED]],
        "sample_count": len(found.samples),
    }


def _compared(row: Row) -> dict[str, Any]:
    """What both models answered to one prompt, with the numbers of each answer and the preference of each judge."""
    sides = {side: row[side] for side in ("model", "baseline") if isinstance(row.get(side), dict)}
    return {
        "prompt": row.get("prompt", ""),
        "answers": {side: answer.get("response", "") for side, answer in sides.items()},
        "numbers": {side: _formatted(answer) for side, answer in sides.items()},
        "preferences": _formatted(row.get("preferences")),
    }


def _formatted(content: Any) -> dict[str, str]:
    return {key: number(value) for key, value in numbers_in(content).items()}
