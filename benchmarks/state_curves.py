"""What narrower optimizer state does to training: loss of the default SFT by how state is stored, over several seeds.

Run: `python -m benchmarks.state_curves --seeds 0 1 2 --folder outputs/state`. A run that is finished in the folder is
not run again. Writes `benchmarks/results/state.md`. All parameters of the default model learn, not adapters alone, on
four demonstrations a step.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

from benchmarks.recipes import ROOT, hardware
from benchmarks.zero_report import spread, table

RESULT = ROOT / "benchmarks/results/state.md"
_SLOW = ("sft.optimizer.betas=[0.9,0.999]",)
_SUMS = ("sft.micro_batch_size=2",)
KINDS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "bf16 moments": ("engine.moments=bf16",),
    "8-bit moments": ("engine.moments=int8",),
    "fp32 sums of 2 micro-batches": _SUMS,
    "bf16 sums of 2 micro-batches": ("engine.grad_accum_dtype=bf16", *_SUMS),
    "8-bit moments, split masters, bf16 sums of 2": (
        *("engine.master_weights=split", "engine.moments=int8", "engine.grad_accum_dtype=bf16"),
        *_SUMS,
    ),
    "fp32, betas 0.9 and 0.999": _SLOW,
    "bf16 moments, betas 0.9 and 0.999": ("engine.moments=bf16", *_SLOW),
    "8-bit moments, betas 0.9 and 0.999": ("engine.moments=int8", *_SLOW),
}

log = logging.getLogger(__name__)


def run(words: tuple[str, ...], *, seed: int, folder: Path) -> tuple[list[float], float]:
    """Loss of every step, and perplexity of held-out rows at the end."""
    if not (folder / "sft/stage.json").exists():
        log.info("%s", folder)
        fixed = ["stage=sft", "sft.lora.rank=0", "engine=zero1", "engine.precision=bf16", "checkpoint.every=0"]
        fixed += ["sft.global_batch_size=4", "sft.micro_batch_size=4", "sft.eval_rows=64"]
        fixed += [f"seed={seed}", f"output_dir={folder}", "tracking.wandb=disabled"]
        command = [sys.executable, str(ROOT / "run_pipeline.py"), *fixed, *words]
        subprocess.run(command, check=True, env={**os.environ, "WANDB_MODE": "disabled"}, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "sft/metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    return losses, json.loads((folder / "sft/stage.json").read_text())["after"]["eval/perplexity"]


def compare(seeds: list[int], folder: Path, *, kinds: list[str]) -> str:
    """A table of the distance from fp32, of the same seed, and of perplexities."""
    found = {
        (name, seed): run(words, seed=seed, folder=folder / re.sub(r"\W+", "_", name) / str(seed))
        for seed in seeds
        for name, words in KINDS.items()
        if name in kinds
    }
    rows = []
    for name, words in KINDS.items():
        if name not in kinds:
            continue
        exact = "fp32, betas 0.9 and 0.999" if _SLOW[0] in words else "fp32"
        apart = [
            statistics.mean(abs(a - b) for a, b in zip(found[name, seed][0], found[exact, seed][0], strict=True))
            for seed in seeds
        ]
        rows.append([name, spread(apart, 4), *(f"{found[name, seed][1]:.2f}" for seed in seeds)])
    head = ["optimizer state", "mean distance of the loss", *(f"perplexity, seed {seed}" for seed in seeds)]
    return table(head, rows)


def main() -> None:
    """Run all kinds and seeds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("outputs/state"))
    parser.add_argument("--kinds", choices=[*KINDS], nargs="+", default=[*KINDS])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = compare(arguments.seeds, arguments.folder, kinds=arguments.kinds)
    command = f"python -m benchmarks.state_curves --seeds {' '.join(map(str, arguments.seeds))}"
    command += f" --kinds {shlex.join(arguments.kinds)}" if arguments.kinds != [*KINDS] else ""
    head = f"# SFT with optimizer state in fewer bytes\n\n`{command}`, {date.today()}, {hardware()}."
    RESULT.write_text(f"{head}\n\n{found}\n")


if __name__ == "__main__":
    main()
