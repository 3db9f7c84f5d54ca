"""What a run says at its start and its end: results, a few samples, the report, what to do next, how to resume."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
from pathlib import Path

from rlhf.config.roles import policy_path
from rlhf.config.run_config import FOLDERS, Embedded, RunConfig
from rlhf.tracking.metric_registry import metric
from rlhf.tracking.report.run_folder import FolderReader, can_report
from rlhf.tracking.text_table import table
from stages.lifecycle.checkpointing import newest_in
from stages.lifecycle.stage_record import is_finished, read_record

log = logging.getLogger(__name__)

_NUM_SAMPLES = 6


def show_results(run: RunConfig) -> None:
    """Print held-out metrics before and after each finished stage and a few samples, and write the report."""
    folder = Path(run.output_dir)
    rows = [row for name in FOLDERS for row in _stage_rows(folder / name)]
    if rows:
        log.info("%s", table("Held-out results", ["stage", "metric", "before", "after", "unit"], rows=rows))
    policy = Path(policy_path(run)).parent
    samples = _sample_pairs(policy / "samples.jsonl")
    if samples:
        name = policy.name.upper()
        log.info(
            "%s", table(f"The same held-out prompts, before and after {name}", ["prompt", "SFT", name], rows=samples)
        )
    write_report(run, folder)
    shown = f"; {folder / 'report.html'} shows it" if run.tracking.report else ""
    log.info("everything is in %s%s", folder, shown)
    steps = next_steps(run)
    if steps:
        log.info("%s", "\n".join(["Next:", *steps]))


def show_start(run: RunConfig) -> None:
    """Say what a run with the tiny model is; any other is what it was asked to be."""
    if run.model.embedded is Embedded.tiny and run.stages:
        log.info(
            "A tiny model with random weights tries the whole code: its texts and scores mean nothing. With the steps "
            "of experiment=smoke that takes one to two minutes on two cores."
        )


def next_steps(run: RunConfig) -> list[str]:
    """At most five lines on what to do with a finished run, each a command or a file."""
    folder = Path(run.output_dir)
    steps = [f"  open {folder / 'report.html'} in a browser"] if run.tracking.report and can_report(folder) else []
    policy = next((path for path in (policy_path(run), f"{folder}/sft/model") if Path(path).exists()), None)
    if policy:
        steps.append(f"  python run_pipeline.py stage=chat {shlex.quote(f'chat.model={policy}')}   talks to it")
    if run.model.embedded is Embedded.tiny:
        return [
            *steps,
            "  python run_pipeline.py   the real recipe: a 135M model and human ratings, 6 to 10 minutes on two cores",
            "  python run_pipeline.py experiment=custom model.path=MODEL 'data.sft.train=[FILE]' "
            "'data.reward.train=[FILE]' 'data.ppo.train=[FILE]'   your own model and data",
        ]
    if policy:
        steps.append(f"  python -m stages.publish {shlex.quote(policy)}   shows what `--to OWNER/NAME` would upload")
    return steps


def write_report(run: RunConfig, folder: Path) -> None:
    """Write `report.html` for the folder of a run or a stage, if there is anything to report.

    A process of its own writes it, so that its memory is free again: the plan of the next stage does not count it.
    """
    if not run.tracking.report or not can_report(folder):
        return
    words = [sys.executable, "-m", "rlhf.tracking.report", str(folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = (done.stderr.strip() or "it was killed").splitlines()[-1]
        log.warning("no report was written for %s (%s); `%s` writes it", folder, why, shlex.join(words))


def where_it_stands(run: RunConfig) -> str:
    """One sentence on how a run that ended early can be resumed."""
    for stage in run.stages:
        newest = newest_in(Path(run.folder(stage)))
        if newest is not None and not is_finished(run, stage):
            return f"{run.title(stage)} is saved in {newest}; the same command goes on from there"
    return "finished stages are kept; the same command goes on after them"


def _stage_rows(folder: Path) -> list[list[object]]:
    record = read_record(folder)
    if record is None:
        return []
    names = sorted({*record.before, *record.after})
    return [[record.stage, name, record.before.get(name), record.after.get(name), metric(name).unit] for name in names]


def _sample_pairs(path: Path) -> list[list[object]]:
    reader = FolderReader(path.parent)
    rows = reader.rows(path.name, required=False)
    for note in reader.notes:
        log.warning("%s/%s", path.parent, note)
    if not rows:
        return []
    first = [row for row in rows if row["step"] == rows[0]["step"]]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    every = max(1, len(first) // _NUM_SAMPLES)
    pairs = list(zip(first, last, strict=False))[::every][:_NUM_SAMPLES]
    return [[before["prompt"], before["response"], after["response"]] for before, after in pairs]
