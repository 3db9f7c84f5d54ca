"""The end of a stage: what its phases took, beside what the plan had expected."""

from __future__ import annotations

import logging
from pathlib import Path

from rlhf.config.run_config import RunConfig
from rlhf.runtime.atomic_files import read_json
from rlhf.runtime.dist import World
from rlhf.tracking.peak_memory import peak_metrics
from rlhf.tracking.text_table import table
from rlhf.tracking.timing import Stopwatch

log = logging.getLogger(__name__)

NUMBERS = "plan.json"


def beside_plan(run: RunConfig, stage: str, *, world: World, timer: Stopwatch) -> dict[str, float]:
    """Show the highest memory of each phase beside its plan, of this rank; returns both as metrics.

    On a CPU the measured peaks include what the allocator has kept from earlier phases.
    """
    planned = read_json(Path(run.output_dir) / NUMBERS).get(stage, {})
    measured = {name: peak for phase, peak in timer.highest.items() for name, peak in peak_metrics(phase, peak).items()}
    rows, expected = [], {}
    for phase, places in planned.items():
        for place in ("device", "host"):
            found = measured.get(f"memory/{phase}_{place}_bytes")
            if not found or not places[place]:
                continue
            expected[f"memory/{phase}_{place}_plan_bytes"] = float(places[place])
            rows.append([phase, place, places[place] / 1e9, found / 1e9, f"{100 * (places[place] / found - 1):+.0f} %"])
    if rows and world.is_main:
        columns = ["phase", "place", "planned", "measured", "difference"]
        log.info("%s", table(f"Memory of {stage}: highest GB of this rank", columns, rows=rows))
    return measured | expected
