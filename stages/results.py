"""The end of a run: one table of what was learnt, and what the policy says now beside what it said before.

Or one sentence, where it ended early.
"""

from __future__ import annotations

import logging
from pathlib import Path

from rlhf.config import STAGES, RunConfig
from rlhf.tracking.journal import Journal
from rlhf.tracking.metrics import metric
from rlhf.tracking.table import table
from stages.handover import is_finished, read_record
from stages.resume import newest_in

log = logging.getLogger(__name__)

_NUM_SAMPLES = 6


def show_results(run: RunConfig) -> None:
    """Print held-out metrics before and after each finished stage, and a few samples of PPO."""
    folder = Path(run.output_dir)
    rows = [row for stage in STAGES for row in _stage_rows(folder / stage)]
    if rows:
        log.info("%s", table("Held-out results", ["stage", "metric", "before", "after", "unit"], rows=rows))
    samples = _sample_pairs(folder / "ppo" / "samples.jsonl")
    if samples:
        log.info("%s", table("The same held-out prompts, before and after PPO", ["prompt", "SFT", "PPO"], rows=samples))
    log.info("everything is in %s", folder)


def where_it_stands(run: RunConfig) -> str:
    """What is left of a run that has ended early, and how to go on."""
    for stage in run.stages:
        newest = newest_in(Path(run.output_dir) / stage)
        if newest is not None and not is_finished(run, stage):
            return f"{stage} is saved in {newest}; the same command goes on from there"
    return "finished stages are kept; the same command goes on after them"


def _stage_rows(folder: Path) -> list[list[object]]:
    record = read_record(folder)
    if record is None:
        return []
    names = sorted({*record.before, *record.after})
    return [[record.stage, name, record.before.get(name), record.after.get(name), metric(name).unit] for name in names]


def _sample_pairs(path: Path) -> list[list[object]]:
    rows = Journal(path).rows()
    if not rows:
        return []
    first = [row for row in rows if row["step"] == rows[0]["step"]]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    every = max(1, len(first) // _NUM_SAMPLES)
    pairs = list(zip(first, last, strict=False))[::every][:_NUM_SAMPLES]
    return [[before["prompt"], before["response"], after["response"]] for before, after in pairs]
