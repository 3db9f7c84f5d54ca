"""An iteration of PPO in its parts, generating, scoring and training: ours and TRL's; process time on one thread.

    python -m benchmarks.ppo_iteration --peer PYTHON --peer-path DIR

The contenders take turns in processes of their own (`rounds.py`), from the same weights. PYTHON is an
interpreter with torch, transformers and datasets, DIR has TRL 1.12, the last release with PPO (`pip install --no-deps
--target DIR trl==1.12.0`); without them TRL is skipped. What a turn does is in `ppo_iteration_run.py`.
Left out: GPUs, more than one rank, wall clock, what is learnt.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.plan import compose_run, write_model
from benchmarks.rounds import ROOT, Contender, alternate
from benchmarks.steps import shape
from benchmarks.zero_report import spread, table, write_section
from stages.setup.compose import save_run

log = logging.getLogger(__name__)

RESULT = ROOT / "benchmarks/results/ppo_iteration.md"
_TITLE = "# An iteration of PPO beside TRL's\n"
PHASES = ("generate", "score", "train")
CASE = {"rows": 32, "prompt": 16, "new": 32, "epochs": 4}
Turn = dict[str, Any]


def overrides(case: dict[str, int], precision: str) -> str:
    """Of the command line that iterates as TRL does: one minibatch, which is the rollout, in one piece."""
    sizes = ("rollout_size", "minibatch_size", "micro_batch_size", "rollout_micro_batch_size")
    settings = dict.fromkeys(sizes, case["rows"]) | {"epochs": case["epochs"], "kl.coef": 0.05}
    settings |= {"max_prompt_tokens": case["prompt"], "max_response_tokens": case["new"]}
    words = [f"ppo.{name}={value}" for name, value in settings.items()]
    return " ".join(["stage=ppo", f"engine.precision={precision}", *words])


def measure(
    size: str, case: dict[str, int], *, rounds: int, peer: tuple[str, str] | None, precision: str = "fp32"
) -> dict[str, list[Turn]]:
    """Seconds of each phase in every round, by contender; `peer` is an interpreter and the folder of its TRL."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, shape(size))
        config = save_run(compose_run(folder, overrides(case, precision)))
        known = case | {"config": str(config), "folder": name}
        starts = {"ours": partial(_start, sys.executable, known | {"contender": "ours"}, folder / "ours.log", {})}
        if peer is not None:
            python, path = peer
            more = {"PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"}
            more |= {"ACCELERATE_MIXED_PRECISION": "bf16"} if precision == "bf16" else {}  # `bf16=True` has no effect
            starts["trl"] = partial(_start, python, known | {"contender": "trl"}, folder / "trl.log", more)
        return alternate(starts, rounds=rounds)


def _start(python: str, case: dict[str, Any], log: Path, variables: dict[str, str]) -> Contender:
    command = [python, "-m", "benchmarks.ppo_iteration_run", json.dumps(case)]
    return Contender(command, log=log, variables=variables)


def compared(found: dict[str, list[Turn]]) -> str:
    """A table of seconds and of ratios within a round."""
    ours, theirs = (
        [{**turn, "all": sum(turn[phase] for phase in PHASES)} for turn in found.get(name, [])]
        for name in ("ours", "trl")
    )
    rows = []
    for phase in (*PHASES, "all"):
        ratio = [b[phase] / a[phase] for a, b in zip(ours, theirs, strict=False)]
        rows.append([phase, *(spread([turn[phase] for turn in turns], 3) for turns in (ours, theirs)), spread(ratio)])
    tokens = {name: {turn["tokens"] for turn in turns} for name, turns in found.items()}
    assert len(set(map(tuple, tokens.values()))) == 1, f"responses of different lengths: {tokens}"
    return table(["", "ours, CPU s", "TRL 1.12", "TRL / ours"], rows)


def section(size: str, precision: str, *, rounds: int, peer: tuple[str, str] | None) -> str:
    """The table of a size and precision."""
    what = (
        f"Four Llamas of {size}, {precision}; {CASE['rows']} prompts of {CASE['prompt']} tokens, {CASE['new']} new "
        f"ones, {CASE['epochs']} epochs of one minibatch; {rounds} rounds. Scoring includes advantages."
    )
    if precision == "bf16":
        what += " Ours has bf16 weights over fp32 masters; TRL autocast where it trains."
    found = measure(size, CASE, rounds=rounds, peer=peer, precision=precision)
    skipped = "TRL was skipped: no Python with it was named (--peer, --peer-path)."
    return "\n\n".join([*([] if peer else [skipped]), what, compared(found)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter with transformers and datasets")
    parser.add_argument("--peer-path", help="folder of trl 1.12")
    parser.add_argument("--sizes", nargs="+", default=["5M", "25M"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", type=Path, default=RESULT, help="Markdown file whose sections are replaced")
    return parser


def main() -> None:
    """Measure each size and precision, and write its section."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    peer = (arguments.peer, arguments.peer_path) if arguments.peer and arguments.peer_path else None
    for size, precision in product(arguments.sizes, arguments.precisions):
        text = section(size, precision, rounds=arguments.rounds, peer=peer)
        write_section(f"{size}, {precision}", text, result=arguments.result, title=_TITLE, module="ppo_iteration")
        log.info("%s, %s\n\n%s", size, precision, text)


if __name__ == "__main__":
    main()
