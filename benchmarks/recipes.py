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
    """The stage that measured it, before and after; `eval` and its names compare the policy with the SFT model."""
    metric: str
    digits: int
    bar: str = ""
    """What is asked of every seed, in words; empty for what is only reported."""
    meets: Callable[[float, float], bool] = lambda _old, _new: True
    """The same of the value before and after."""


class Recipe(NamedTuple):
    """A run that the project offers, and what is asked of it."""

    title: str
    words: tuple[str, ...]
    """Of the command line."""
    rows: tuple[Row, ...]
    further: tuple[str, ...] = ()
    """Words of a second run in the same folder, whose time does not count."""


SFT = Row("held-out perplexity", "sft", "eval/perplexity", 1, "falls by a third", lambda old, new: new <= old * 2 / 3)
REVIEWS = (
    Row("predicted human rating", "eval", "gold/rating", 2, "rises by 0.4", lambda old, new: new - old >= 0.4),
    Row("sentiment lexicon", "eval", "gold/lexicon", 2, "rises", lambda old, new: new > old),
    Row("KL to the SFT model", "eval", "kl", 1, "at most 6", lambda _, new: new <= 6),
    Row("response tokens", "eval", "length", 1, "at least 70 %", lambda old, new: new >= 0.7 * old),
    Row("distinct bigrams", "eval", "distinct_2", 2, "falls by at most 0.1", lambda old, new: new >= old - 0.1),
    Row("cut at 24 tokens", "eval", "not_ended", 2),
)
RECIPES = {
    "ppo": Recipe(
        "The default run: supervised fine-tuning, a reward model, PPO",
        ("stage=[sft,reward,ppo,eval]",),
        (
            SFT,
            Row("preference accuracy", "reward", "eval/accuracy", 3, "at least 0.88", lambda _, new: new >= 0.88),
            Row("reward model's score", "ppo", "eval/score", 2, "rises", lambda old, new: new > old),
            *REVIEWS,
        ),
    ),
    "dpo": Recipe(
        "The same reviews: supervised fine-tuning, DPO",
        ("stage=[sft,dpo,eval]",),
        (
            SFT,
            Row("preference accuracy", "dpo", "eval/accuracy", 3, "rises", lambda old, new: new > old),
            *REVIEWS,
        ),
    ),
    "reasoning": Recipe(
        "Sums with a verifier and no reward model: supervised fine-tuning, GRPO",
        ("experiment=reasoning", "stage=[sft,grpo,eval]"),
        (
            Row("right answers", "eval", "reward/correct", 2, "rises by 0.3", lambda old, new: new - old >= 0.3),
            Row("right answers, greedy", "eval/greedy", "reward/correct", 2),
            Row("in the format", "eval", "reward/formatted", 2, "at least 0.95", lambda _, new: new >= 0.95),
            Row("response tokens", "eval", "length", 1, "not shorter", lambda old, new: new >= old),
            Row("same as for another prompt", "eval", "repeated", 2, "does not rise", lambda old, new: new <= old),
            Row("KL to the SFT model", "eval", "kl", 1),
            Row("cut at 40 tokens", "eval", "not_ended", 2, "at most 0.05", lambda _, new: new <= 0.05),
        ),
        ("experiment=reasoning", "stage=eval", "eval.name=greedy", "eval.sampling.temperature=0"),
    ),
}


def run_seed(recipe: Recipe, seed: int, folder: Path) -> float:
    """Run the recipe, unless it is finished; returns wall-clock seconds, from the program's start to its end.

    Raises:
        ValueError: the folder holds a run that was interrupted, of which the time is not known.
    """
    record = folder / SECONDS
    if not record.exists():
        if folder.exists():
            raise ValueError(f"{folder}: found a run that was interrupted, so its time is not known; remove it.")
        started = time.monotonic()
        _run(*recipe.words, f"seed={seed}", f"output_dir={folder}")
        seconds = time.monotonic() - started
        if recipe.further:
            _run(*recipe.further, f"seed={seed}", f"output_dir={folder}")
        record.write_text(json.dumps(seconds))
    return float(json.loads(record.read_text()))


def _run(*words: str) -> None:
    command = [sys.executable, str(ROOT / "run_pipeline.py"), *words]
    subprocess.run(command, check=True, env={**os.environ, "WANDB_MODE": "offline"})


def table(recipe: Recipe, folders: dict[int, Path], seconds: dict[int, float]) -> str:
    """The results of all seeds as Markdown; a value that misses the bar is marked."""
    head = ["held-out", "asked of every seed", *(f"seed {seed}" for seed in folders)]
    lines = [head, ["---"] * len(head)]
    for row in recipe.rows:
        lines.append([row.name, row.bar, *(_cell(row, *values(row, folder)) for folder in folders.values())])
    times = [f"{value / 60:.1f}{' (missed)' if value > 600 else ''}" for value in seconds.values()]
    lines.append(["wall-clock minutes", "at most 10", *times])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def values(row: Row, folder: Path) -> tuple[float, float]:
    """The value before and after, or of the SFT model and of the policy that was trained from it."""
    if row.stage.startswith("eval"):
        measures = json.loads((folder / row.stage / "results.json").read_text())["measures"]
        found = next(measure for measure in measures if measure["name"] == row.metric)
        return found["baseline"]["mean"], found["model"]["mean"]
    record = json.loads((folder / row.stage / "stage.json").read_text())
    return record["before"][row.metric], record["after"][row.metric]


def _cell(row: Row, before: float, after: float) -> str:
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
