"""A step of SFT, reward modelling and DPO: ours, TRL's trainers, and PyTorch alone; process time on one thread.

    python -m benchmarks.steps --peer PYTHON
    python -m benchmarks.steps --sizes 6M --precisions fp32 --stages sft

The contenders take turns in processes of their own (`rounds.py`), from the same weights, on the same rows, and their
losses agree. PYTHON is an interpreter with torch, transformers, datasets and trl 1.16; without it TRL is skipped.
What a turn does is in `steps_run.py`. Left out: GPUs, more than one rank, wall clock.
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
from benchmarks.steps_run import BATCHES, RATE
from benchmarks.zero_report import spread, table, write_section
from benchmarks.zero_run import SIZES
from rlhf.models.embedded import byte_tokenizer
from stages.setup.compose import save_run

log = logging.getLogger(__name__)

RESULT = ROOT / "benchmarks/results/steps.md"
_TITLE = "# A step of SFT, reward modelling and DPO beside TRL and PyTorch alone\n"
_SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
_SMOLLM2 |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
STEPS = {"1M": 4, "6M": 8, "25M": 4, "135M": 1}
"""Of a turn, by size."""
ROWS = {"sft": 8, "reward": 4, "dpo": 4}
"""Of a step: sequences, or pairs."""
LIMITS = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest difference of a loss to that of PyTorch alone, relative."""


def shape(size: str) -> dict[str, Any]:
    """Settings of `LlamaConfig`; 135M is the shape of SmolLM2."""
    if size == "135M":
        return _SMOLLM2
    width, inner, layers, vocabulary = SIZES[size]
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    return heads | dict(
        zip(
            ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
            (width, inner, layers, vocabulary),
            strict=True,
        )
    )


def overrides(stage: str, *, precision: str, length: int, model: Path) -> str:
    """Of the command line that trains as the others do; the model of a reward stage has its head already."""
    optimizer = {"lr": RATE, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0, "eps": 1e-8}
    settings = {f"optimizer.{name}": value for name, value in optimizer.items()}
    settings |= {"init_from": model, "global_batch_size": ROWS[stage], "micro_batch_size": ROWS[stage]}
    settings |= {"max_prompt_tokens": length, "max_response_tokens": length}
    settings |= {"center_coef": 0} if stage == "reward" else {}
    words = [f"{stage}.{name}={value}" for name, value in settings.items()]
    return " ".join([f"stage={stage}", f"engine.precision={precision}", *words])


def measure(stage: str, *, size: str, precision: str, rounds: int, length: int, peer: str | None) -> list[str]:
    """The row of a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, shape(size))
        model = folder / ("reward" if stage == "reward" else "model")
        run = compose_run(folder, overrides(stage, precision=precision, length=length, model=model))
        case = {"stage": stage, "precision": precision, "length": length, "rows": ROWS[stage], "steps": STEPS[size]}
        case |= {"config": str(save_run(run)), "model": str(model), "folder": str(folder / "out")}
        case |= {"pad_id": byte_tokenizer().pad_token_id}
        pythons = {"plain": sys.executable, "ours": sys.executable} | ({"trl": peer} if peer else {})
        starts = {
            contender: partial(_start, python, case | {"contender": contender}, folder / f"{contender}.log")
            for contender, python in pythons.items()
        }
        found = alternate(starts, rounds=rounds)
    return _row(stage, found, precision=precision)


def _start(python: str, case: dict[str, Any], log: Path) -> Contender:
    return Contender([python, "-m", "benchmarks.steps_run", json.dumps(case)], log=log)


def _row(stage: str, found: dict[str, list[dict[str, Any]]], *, precision: str) -> list[str]:
    """Milliseconds and ratios within a round; the losses of all turns are compared."""
    cpu = {name: [1e3 * turn["cpu_seconds"] for turn in turns] for name, turns in found.items()}
    losses = {name: [loss for turn in turns for loss in turn["losses"]] for name, turns in found.items()}
    apart = {
        name: max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(own, losses["plain"], strict=True))
        for name, own in losses.items()
    }
    assert max(apart.values()) < LIMITS[precision], f"{stage}: not the same training, losses differ by {apart}"
    ratio = [a / b for a, b in zip(cpu["ours"], cpu["plain"], strict=True)]
    against = [a / b for a, b in zip(cpu.get("trl", []), cpu["ours"], strict=False)]
    times = [spread(cpu.get(name, []), 1) for name in ("plain", "ours", "trl")]
    differences = [f"{apart[name]:.0e}" if name in apart else "–" for name in ("ours", "trl")]
    return [stage, *times, spread(ratio), spread(against), *differences]


def section(size: str, precision: str, arguments: argparse.Namespace) -> str:
    """The table of a size and precision."""
    sizes = {"size": size, "precision": precision, "rounds": arguments.rounds, "length": arguments.length}
    rows = [measure(stage, **sizes, peer=arguments.peer) for stage in arguments.stages]
    head = ["", "PyTorch alone, CPU ms", "ours", "TRL", "ours / PyTorch", "TRL / ours"]
    head += ["loss: largest difference of ours to PyTorch's", "of TRL's"]
    what = (
        f"{arguments.length // 2} to {arguments.length} tokens a sequence; {ROWS['sft']} sequences or {ROWS['dpo']} "
        f"pairs a step, in one micro-batch; {BATCHES} batches in turn; {arguments.rounds} rounds of {STEPS[size]}. "
        "In bf16, ours and PyTorch have fp32 masters, TRL autocast. DPO's reference was asked before training."
    )
    return "\n\n".join([*([] if arguments.peer else [SKIPPED]), what, table(head, rows)])


SKIPPED = "TRL was skipped: no Python with it was named (--peer)."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter with trl")
    parser.add_argument("--sizes", nargs="+", choices=STEPS, default=["6M", "25M", "135M"])
    parser.add_argument("--precisions", nargs="+", choices=LIMITS, default=["fp32", "bf16"])
    parser.add_argument("--stages", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=64, help="tokens of the longest sequence")
    parser.add_argument("--result", type=Path, default=RESULT, help="Markdown file whose sections are replaced")
    return parser


def main() -> None:
    """Measure each size and precision, and write its section."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for size, precision in product(arguments.sizes, arguments.precisions):
        text = section(size, precision, arguments)
        write_section(f"{size}, {precision}", text, result=arguments.result, title=_TITLE, module="steps")
        log.info("%s, %s\n\n%s", size, precision, text)


if __name__ == "__main__":
    main()
