"""One HTML file that shows a run: it needs no network and no server, and nothing in it but its own script can run.

Whatever a model or a data set says is escaped by the template, and control characters are made visible. Left out: what
the numbers mean (`rlhf/tracking/metric_registry.py`), and what is worrying in them (`rlhf/tracking/watch.py`).
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlhf.tracking.answer_statistics import by_step, is_number
from rlhf.tracking.report import figures
from rlhf.tracking.report.reading import Row
from rlhf.tracking.report.results import headlines
from rlhf.tracking.report.run_folder import RunFolder, StageFolder, read_run
from rlhf.tracking.report.verdicts import look_at, when
from rlhf.tracking.text_table import number, printable_lines

REPORT = "report.html"
MOST_SAMPLES = 200  # in the page; all are in samples.jsonl


@dataclass(frozen=True)
class Pair:
    """What was answered to a held-out prompt before and after."""

    prompt: str
    before: Row
    after: Row

    @property
    def gained(self) -> float:
        """Change of the score; 0 where it is not known."""
        old, new = self.before.get("score"), self.after.get("score")
        return float(new) - float(old) if is_number(old) and is_number(new) else 0.0

    def numbers(self, row: Row) -> Iterator[tuple[str, str]]:
        """Everything but the texts, by name."""
        for key, value in row.items():
            if key not in ("prompt", "response", "step"):
                yield key, number(value) if isinstance(value, float) else str(value)


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
    """The report as HTML.

    Args:
        run: what is shown.
        refresh: seconds after which a browser asks for the page again; 0 for a file.
    """
    script = _part("page.js")
    ppo = run.stage("ppo")
    pairs = _pairs(ppo) if ppo else []
    return render(
        "page.html.jinja",
        run=run,
        refresh=refresh,
        written=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        headlines=[line for stage in run.stages for line in headlines(stage)],
        looks=[look_at(stage) for stage in run.stages],
        when=when,
        overview=figures.overview(ppo) if ppo else [],
        sections={stage.name: figures.sections(stage) for stage in run.stages},
        cost={stage.name: figures.cost(stage) for stage in run.stages},
        pairs=pairs[:MOST_SAMPLES],
        pair_count=len(pairs),
        diff=difference,
    )


def render(template: str, **content: Any) -> str:
    """A template with its content, escaped, in the style of all pages."""
    environment = Environment(loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined)
    environment.filters["visible"] = visible
    return environment.get_template(template).render(style=Markup(_part("page.css")), **content)


def visible(text: object) -> str:
    """`text` with every character that could hide or turn something written as an escape; lines stay lines."""
    return printable_lines(str(text))


def difference(before: str, after: str) -> Markup:
    """`after`, word by word: what is new is marked, what is gone is struck through."""
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


def _pairs(stage: StageFolder) -> list[Pair]:
    """The first and the last answers to each prompt."""
    answers = by_step(stage.samples)
    if len(answers) < 2:
        return []
    first, last = answers[min(answers)], answers[max(answers)]
    return [
        Pair(str(after.get("prompt", "")), before, after)
        for before, after in zip(first, last, strict=False)
        if before.get("prompt") == after.get("prompt")
    ]


def _part(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
