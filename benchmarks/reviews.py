"""The embedded default over several seeds: what is learnt, what it costs, and whether it meets its own bar.

Run: `python -m benchmarks.reviews --seeds 0 1 2 --folder outputs/reviews`. A seed that is finished in the folder is not
run again. Writes `benchmarks/results/reviews.md` with the hardware and the command.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf.config.run_config import STAGES

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/reviews.md"

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One line of the table."""

    name: str
    stage: str
    metric: str
    digits: int
    bar: str
    """What is asked of every seed, in words."""
    meets: Callable[[float, float], bool]
    """The same of the value before and after."""


ROWS = (
    Row("held-out perplexity", "sft", "eval/perplexity", 1, "falls by a third", lambda old, new: new <= old * 2 / 3),
    Row("preference accuracy", "reward", "eval/accuracy", 3, "at least 0.88", lambda _, new: new >= 0.88),
    Row("reward model's score", "ppo", "eval/score", 2, "rises", lambda old, new: new > old),
    Row("predicted human rating", "ppo", "gold/rating", 2, "rises by 0.4", lambda old, new: new - old >= 0.4),
    Row("sentiment lexicon", "ppo", "gold/lexicon", 2, "rises", lambda old, new: new > old),
    Row("KL to the reference", "ppo", "eval/kl", 1, "at most 6", lambda _, new: new <= 6),
    Row("response tokens", "ppo", "eval/response_length", 1, "at least 70 %", lambda old, new: new >= 0.7 * old),
    Row("distinct bigrams", "ppo", "eval/distinct_2", 2, "at least 0.75", lambda _, new: new >= 0.75),
    Row("ends by itself", "ppo", "eval/eos_rate", 2, "", lambda _old, _new: True),
)


def run_seed(seed: int, folder: Path) -> None:
    """Run the whole pipeline, or what is left of it."""
    command = [sys.executable, str(ROOT / "run_pipeline.py"), f"seed={seed}", f"output_dir={folder}"]
    subprocess.run(command, check=True, env={**os.environ, "WANDB_MODE": "offline"})


def seconds_of(folder: Path) -> float:
    """Wall-clock seconds of the logged steps of all stages, evaluation included."""
    lines = [line for stage in STAGES for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
    return sum(float(json.loads(line)["timing_s/step"]) for line in lines)


def table(folders: dict[int, Path]) -> str:
    """The results of all seeds as Markdown; a value that misses the bar is marked."""
    head = ["held-out", "asked of every seed", *(f"seed {seed}" for seed in folders)]
    lines = [head, ["---"] * len(head)]
    records = {
        seed: {s: json.loads((folder / s / "stage.json").read_text()) for s in STAGES}
        for seed, folder in folders.items()
    }
    for row in ROWS:
        cells = [_cell(row, records[seed][row.stage]) for seed in folders]
        lines.append([row.name, row.bar, *cells])
    lines.append(
        ["wall-clock minutes", "at most 10", *(f"{seconds_of(folder) / 60:.1f}" for folder in folders.values())]
    )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(row: Row, record: dict[str, dict[str, float]]) -> str:
    before, after = record["before"][row.metric], record["after"][row.metric]
    missed = "" if row.meets(before, after) else " (missed)"
    return f"{before:.{row.digits}f} → {after:.{row.digits}f}{missed}"


def hardware() -> str:
    """Processor, cores and versions."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    processor = names[0] if names else platform.processor()
    return f"{processor}, {os.cpu_count()} cores, PyTorch {torch.__version__}, Python {platform.python_version()}"


def main() -> None:
    """Run the seeds one after the other and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("outputs/reviews"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folders = {seed: arguments.folder / f"seed{seed}" for seed in arguments.seeds}
    for seed, folder in folders.items():
        run_seed(seed, folder)
    seeds = " ".join(map(str, arguments.seeds))
    title = f"# The embedded default\n\n`python -m benchmarks.reviews --seeds {seeds}`, {date.today()}, {hardware()}."
    RESULT.write_text(f"{title}\n\n{table(folders)}\n")
    log.info("%s", RESULT.read_text())


if __name__ == "__main__":
    main()
