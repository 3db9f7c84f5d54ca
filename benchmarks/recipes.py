"""The recipes of this project over several seeds: what is learnt, what it costs, and whether each meets its own bar.

Run: `python -m benchmarks.recipes --recipes ppo dpo reasoning --seeds 0 1 2 --folder outputs/recipes`. A seed that is
finished in the folder is not run again. Writes a table for each recipe, `benchmarks/results/RECIPE.md`, with the
hardware and the command.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
SECONDS = "benchmark_seconds.json"

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One line of a table."""

    name: str
    stage: str
    metric: str
    digits: int
    bar: str
    """What is asked of every seed, in words."""
    meets: Callable[[float, float], bool]
    """The same of the value before and after."""


class Recipe(NamedTuple):
    """A run that the project offers, and what is asked of it."""

    title: str
    words: tuple[str, ...]
    """Of the command line."""
    rows: tuple[Row, ...]


def perplexity_falls(old: float, new: float) -> bool:
    """By a third."""
    return new <= old * 2 / 3


def reviews_rows(stage: str) -> tuple[Row, ...]:
    """What is asked of a policy that was trained on the preferences between reviews."""
    return (
        Row("held-out perplexity", "sft", "eval/perplexity", 1, "falls by a third", perplexity_falls),
        Row("predicted human rating", stage, "gold/rating", 2, "rises by 0.4", lambda old, new: new - old >= 0.4),
        Row("sentiment lexicon", stage, "gold/lexicon", 2, "rises", lambda old, new: new > old),
        Row("KL to the reference", stage, "eval/kl", 1, "at most 6", lambda _, new: new <= 6),
        Row("response tokens", stage, "eval/response_length", 1, "at least 70 %", lambda old, new: new >= 0.7 * old),
        Row("distinct bigrams", stage, "eval/distinct_2", 2, "at least 0.75", lambda _, new: new >= 0.75),
        Row("ends by itself", stage, "eval/eos_rate", 2, "", lambda _old, _new: True),
    )


RECIPES = {
    "ppo": Recipe(
        "The default run: supervised fine-tuning, a reward model, PPO",
        (),
        (
            Row("preference accuracy", "reward", "eval/accuracy", 3, "at least 0.88", lambda _, new: new >= 0.88),
            Row("reward model's score", "ppo", "eval/score", 2, "rises", lambda old, new: new > old),
            *reviews_rows("ppo"),
        ),
    ),
    "dpo": Recipe(
        "The same reviews: supervised fine-tuning, DPO",
        ("stage=[sft,dpo]",),
        (
            Row("preference accuracy", "dpo", "eval/accuracy", 3, "rises", lambda old, new: new > old),
            *reviews_rows("dpo"),
        ),
    ),
    "reasoning": Recipe(
        "Sums with a verifier and no reward model: supervised fine-tuning, GRPO",
        ("experiment=reasoning",),
        (
            Row("right answers", "grpo", "eval/reward/correct", 2, "rises by 0.3", lambda old, new: new - old >= 0.3),
            Row("in the format", "grpo", "eval/reward/formatted", 2, "at least 0.95", lambda _, new: new >= 0.95),
            Row("response tokens", "grpo", "eval/response_length", 1, "not shorter", lambda old, new: new >= old),
            Row("distinct bigrams", "grpo", "eval/distinct_2", 2, "", lambda _old, _new: True),
            Row("KL to the reference", "grpo", "eval/kl", 1, "", lambda _old, _new: True),
            Row("ends by itself", "grpo", "eval/eos_rate", 2, "at least 0.95", lambda _, new: new >= 0.95),
        ),
    ),
}


def run_seed(recipe: Recipe, seed: int, folder: Path) -> float:
    """Run the recipe, unless it is finished; returns wall-clock seconds, from the program's start to its end."""
    record = folder / SECONDS
    if not record.exists():
        command = [sys.executable, str(ROOT / "run_pipeline.py"), *recipe.words, f"seed={seed}", f"output_dir={folder}"]
        started = time.monotonic()
        subprocess.run(command, check=True, env={**os.environ, "WANDB_MODE": "offline"})
        record.write_text(json.dumps(time.monotonic() - started))
    return float(json.loads(record.read_text()))


def table(recipe: Recipe, folders: dict[int, Path], seconds: dict[int, float]) -> str:
    """The results of all seeds as Markdown; a value that misses the bar is marked."""
    head = ["held-out", "asked of every seed", *(f"seed {seed}" for seed in folders)]
    lines = [head, ["---"] * len(head)]
    for row in recipe.rows:
        cells = [_cell(row, json.loads((path / row.stage / "stage.json").read_text())) for path in folders.values()]
        lines.append([row.name, row.bar, *cells])
    times = [f"{value / 60:.1f}{' (missed)' if value > 600 else ''}" for value in seconds.values()]
    lines.append(["wall-clock minutes", "at most 10", *times])
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
    """Run the seeds one after the other and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", choices=[*RECIPES], nargs="+", default=[*RECIPES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("outputs/recipes"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in arguments.recipes:
        recipe, seeds = RECIPES[name], " ".join(map(str, arguments.seeds))
        folders = {seed: arguments.folder / f"{name}_seed{seed}" for seed in arguments.seeds}
        seconds = {seed: run_seed(recipe, seed, folder) for seed, folder in folders.items()}
        command = f"python -m benchmarks.recipes --recipes {name} --seeds {seeds}"
        result = ROOT / f"benchmarks/results/{name}.md"
        head = f"# {recipe.title}\n\n`{command}`, {date.today()}, {hardware()}."
        result.write_text(f"{head}\n\n{table(recipe, folders, seconds)}\n")
        log.info("%s", result.read_text())


if __name__ == "__main__":
    main()
