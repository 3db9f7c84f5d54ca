"""What a long PPO run piles up: memory, open files, threads and objects of each rank, over hundreds of iterations.

    python -m benchmarks.long_run

Actor, critic, reference and reward model are tiny and at ZeRO 3, so an iteration takes a fraction of a second, and has
everything that a large one has: weights gathered for generation and freed again, rollouts that travel, updates,
evaluations, metrics; in some cases checkpoints that are written meanwhile, and W&B without a network. Each case runs
in processes of its own (`long_run_rank.py`). Memory may still grow a little at first, while caches fill; afterwards
every value must stay what it is. On a CUDA device the allocator's own numbers are among them.
Left out: what is learnt, and speed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.long_run_rank import Reading
from benchmarks.plan import compose_run, write_model
from benchmarks.rounds import ROOT
from benchmarks.zero_report import table, write_section
from rlhf.runtime.process import VARIABLES
from stages.setup.compose import save_run

log = logging.getLogger(__name__)

RESULT = ROOT / "benchmarks/results/long_run.md"
_TITLE = "# What a long run piles up\n"
SHAPE = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 2}
EVERY = 10
"""Iterations from one reading to the next."""
SETTLED = 40
"""Iterations after which nothing may grow."""
LIMITS = {"own memory, MB": 4.0, "shared memory, MB": 4.0, "objects": 1000.0, "CUDA: reserved and unused, MB": 64.0}
"""How much more there may be at the end; of everything that is not named, nothing."""
_ENDS = 4  # readings at either end, whose medians are compared
_SIZES = (
    "ppo.rollout_size=8 ppo.rollout_micro_batch_size=4 ppo.minibatch_size=4 ppo.micro_batch_size=2 ppo.epochs=1 "
    "ppo.max_prompt_tokens=64 ppo.max_response_tokens=8 ppo.eval_prompts=4 launch.threads=1"
)


class Case(NamedTuple):
    """A run."""

    name: str
    ranks: int
    settings: str


CASES = [
    Case(f"{ranks} rank{'s' * (ranks > 1)}, {what}", ranks, settings)
    for ranks in (1, 2)
    for what, settings in {
        "no checkpoints": "tracking.wandb=disabled",
        "a checkpoint every 20 iterations, W&B offline": "checkpoint.every=20 tracking.wandb=offline ppo.eval_every=20",
    }.items()
]


def measure(case: Case, *, iterations: int, every: int = EVERY, device: str = "cpu") -> list[list[Reading]]:
    """The readings of each rank."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, SHAPE)
        words = f"stage=ppo engine=zero3 engine.precision=fp32 {_SIZES} tracking.progress=quiet"
        run = compose_run(folder, f"{words} {case.settings} ppo.iterations={iterations}", device=device)
        Path(run.output_dir).mkdir()
        command = ["-m", "benchmarks.long_run_rank", str(save_run(run)), name, str(every)]
        if case.ranks > 1:
            command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}", *command]
        variables = os.environ | VARIABLES | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], cwd=ROOT, env=variables, check=True, stdout=sys.stderr)
        files = [folder / f"rank{rank}.jsonl" for rank in range(case.ranks)]
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


class Growth(NamedTuple):
    """How one value went on once the run had settled, on the rank where it grew most."""

    first: float
    """Median of the first readings."""
    last: float
    """Median of the last ones."""
    slope: float
    """Per iteration, by least squares."""


def growth(readings: list[list[Reading]], value: str, *, settled: int = SETTLED) -> Growth:
    """Of a value, from iteration `settled` on."""
    found = []
    for rank in readings:
        points = [(reading["step"], reading[value]) for reading in rank if reading["step"] > settled]
        values = [held for _, held in points]
        slope = statistics.linear_regression(*zip(*points, strict=True)).slope
        found.append(Growth(statistics.median(values[:_ENDS]), statistics.median(values[-_ENDS:]), slope))
    return max(found, key=lambda one: one.last - one.first)


def report(readings: list[list[Reading]], *, settled: int = SETTLED) -> str:
    """A table of the values, each with its limit."""
    rows = []
    for value in readings[0][0]:
        if value == "step":
            continue
        found, limit = growth(readings, value, settled=settled), LIMITS.get(value, 0.0)
        verdict = "flat" if found.last - found.first <= limit else "**grows**"
        digits = 1 if "MB" in value else 0
        held = [f"{number:.{digits}f}" for number in (found.first, found.last)]
        rows.append([value, *held, f"{found.slope:+.4f}", f"{limit:.0f}", verdict])
    return table(["", "settled", "at the end", "per iteration", "may grow by", ""], rows)


def main() -> None:
    """Measure each case and write its section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--cases", type=int, nargs="+", choices=range(len(CASES)), default=list(range(len(CASES))))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--result", type=Path, default=RESULT, help="Markdown file whose sections are replaced")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for case in (CASES[number] for number in arguments.cases):
        readings = measure(case, iterations=arguments.iterations, device=arguments.device)
        what = f"{arguments.iterations} iterations; readings every {EVERY}, those after iteration {SETTLED} count."
        text = f"{what}\n\n{report(readings)}"
        write_section(case.name, text, result=arguments.result, title=_TITLE, module="long_run")
        log.info("%s\n\n%s", case.name, text)


if __name__ == "__main__":
    main()
