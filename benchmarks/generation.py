"""Generation: ours, `transformers.generate`, and the products of weights alone; process time on one thread.

    python -m benchmarks.generation
    python -m benchmarks.generation --sizes 5M --precisions fp32 --rows 8 --lengths unequal --draws sampled

The contenders take turns in processes of their own (`rounds.py`), from the same weights, with the same prompts and
lengths of responses. A further table has ranks that decode gathered, and with parameters sharded (ZeRO-3). What a turn
does is in `generation_run.py`. Left out: GPUs, wall clock.
"""

from __future__ import annotations

import argparse
import json
import logging
import socket
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.generation_run import LONG, limits
from benchmarks.plan import compose_run, write_model
from benchmarks.rounds import ROOT, Contender, alternate
from benchmarks.steps import shape
from benchmarks.zero_report import spread, table, write_section
from rlhf.runtime.process import VARIABLES
from stages.setup.compose import save_run

log = logging.getLogger(__name__)

RESULT = ROOT / "benchmarks/results/generation.md"
_TITLE = "# Generation beside transformers\n"
NEW = {"1M": 16, "5M": 64, "135M": 32}
"""Tokens of the longest response, by size."""
PROMPT = 16
RANKED = {"rows": 8, "prompts": 8, "prompt": PROMPT, "new": 32, "lengths": "equal", "draws": "sampled"}
"""What each rank does in the table of ranks."""
_MKL = "ours, MKL"
_THEIRS = ("dynamic", "static")
_SHOWN = ("floor", "ours", _MKL, *_THEIRS)
Case = dict[str, Any]
Found = dict[str, list[dict[str, Any]]]
"""What each contender reports of every round."""


def cases(size: str, *, rows: Sequence[int], lengths: str, draws: Sequence[str]) -> list[Case]:
    """Equal responses have as many prompts as rows; with unequal ones, more prompts wait."""
    found = []
    for count, draw in product(rows, draws):
        waiting = 1 if lengths == "equal" else 2 if count > 32 else 4
        case = {"rows": count, "prompts": count * waiting, "prompt": PROMPT, "new": NEW[size]}
        found.append(case | {"lengths": lengths, "draws": draw})
    return found


def measure(
    size: str, precision: str, *, wanted: list[Case], rounds: int, contenders: Sequence[str], ranks: int = 1
) -> list[Found]:
    """Every case in as many rounds, from one start of each contender."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, shape(size))
        task = {"precision": precision, "model": str(folder / "model"), "cases": wanted, "rounds": rounds}
        starts = {}
        for number, contender in enumerate(contenders):
            config = _config(folder, contender, precision=precision, number=number)
            own = task | {"contender": contender, "config": config}
            starts[contender] = partial(_start, own, log=folder / f"{number}.log", ranks=ranks)
        found = alternate(starts, rounds=rounds * len(wanted))
    places = range(0, rounds * len(wanted), rounds)
    return [{name: turns[place : place + rounds] for name, turns in found.items()} for place in places]


def _config(folder: Path, contender: str, *, precision: str, number: int) -> str:
    """The configuration file of ours."""
    settings = [f"stage=ppo engine.precision={precision}", f"output_dir={folder / str(number)}"]
    settings += ["engine.fast_fp32_matmul=false"] * (contender == _MKL)
    settings += ["engine=zero3"] * (contender in ("gathered", "sharded"))
    settings += ["engine.stream_generation=true"] * (contender == "sharded")
    return str(save_run(compose_run(folder, " ".join(settings))))


def _start(task: Case, *, log: Path, ranks: int) -> Contender:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if task["contender"] not in _THEIRS:
        variables |= VARIABLES
    return Contender(
        [sys.executable, "-m", "benchmarks.generation_run", json.dumps(task)], log=log, variables=variables
    )


def row(case: Case, found: Found) -> list[str]:
    """Tokens a second, and ratios of time within a round; greedily, the share of tokens that are theirs."""
    tokens = sum(limits(case))
    cpu = {name: [turn["cpu_seconds"] for turn in turns] for name, turns in found.items()}
    speeds = [spread([tokens / seconds for seconds in cpu.get(name, [])], 0) for name in _SHOWN]
    slower = [_ratios(cpu.get(name, []), cpu["ours"]) for name in _THEIRS]
    above = _ratios(cpu["ours"], cpu["floor"])
    own, others = (_tokens(found[name][0]) for name in ("ours", "dynamic"))
    assert len(own) == len(others) == tokens, f"{len(own)} and {len(others)} tokens, expected {tokens}"
    equal = sum(a == b for a, b in zip(own, others, strict=True)) / tokens
    shared = f"{equal:.1%}" if case["draws"] == "greedy" else "–"
    return [str(case["rows"]), case["lengths"], case["draws"], *speeds, *slower, above, shared]


def _tokens(turn: dict[str, Any]) -> list[int]:
    return [token for response in turn["responses"] for token in response]


def _ratios(times: list[float], others: list[float]) -> str:
    return spread([a / b for a, b in zip(times, others, strict=False)])


def section(size: str, precision: str, arguments: argparse.Namespace) -> str:
    """The table of a size and precision."""
    rows = []
    for lengths in arguments.lengths:
        wanted = cases(size, rows=arguments.rows, lengths=lengths, draws=arguments.draws)
        contenders = ["floor", "ours", *([_MKL] if precision == "fp32" else []), "dynamic"]
        contenders += ["static"] * (lengths == "equal")
        found = measure(size, precision, wanted=wanted, rounds=arguments.rounds, contenders=contenders)
        rows += [row(case, turns) for case, turns in zip(wanted, found, strict=True)]
    head = ["rows", "lengths", "tokens are", "products alone, tokens / CPU s", "ours", _MKL, "transformers, dynamic"]
    head += ["transformers, static", "dynamic / ours", "static / ours", "ours / products", "equal tokens"]
    what = (
        f"Prompts of {PROMPT} tokens, {NEW[size]} new ones; of unequal responses one in {LONG} has as many, and the "
        f"others at most {max(NEW[size] // LONG, 1)}: 4 prompts a row wait for ours (2 with 128 rows), and "
        f"transformers takes batch after batch. {arguments.rounds} rounds. Ours also returns log-probabilities."
    )
    return f"{what}\n\n{table(head, rows)}"


def ranks_section(arguments: argparse.Namespace) -> str:
    """Gathered once, or gathered in every forward, by number of ranks."""
    rows = []
    for ranks in arguments.ranks:
        (found,) = measure(
            "5M", "fp32", wanted=[RANKED], rounds=arguments.rounds, contenders=("gathered", "sharded"), ranks=ranks
        )
        tokens = ranks * sum(limits(RANKED))
        cpu = {name: [turn["cpu_seconds"] for turn in turns] for name, turns in found.items()}
        speeds = [spread([tokens / seconds for seconds in times], 0) for times in cpu.values()]
        rows.append([str(ranks), *speeds, _ratios(cpu["sharded"], cpu["gathered"])])
    head = ["ranks", "gathered, tokens / CPU s of all ranks", "sharded", "sharded / gathered, CPU time"]
    what = (
        f"5M, fp32, ZeRO-3 over gloo; each rank samples {RANKED['new']} tokens for {RANKED['rows']} prompts of "
        f"{PROMPT}; {arguments.rounds} rounds. Gathering is part of the time. Sharded is engine.stream_generation=true."
    )
    return f"{what}\n\n{table(head, rows)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=NEW, default=["5M", "135M"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 32, 128], help="decoded at once")
    parser.add_argument("--lengths", nargs="+", choices=["equal", "unequal"], default=["equal", "unequal"])
    parser.add_argument("--draws", nargs="+", choices=["greedy", "sampled"], default=["greedy", "sampled"])
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2, 4], help="of the table of ranks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--result", type=Path, default=RESULT, help="Markdown file whose sections are replaced")
    return parser


def main() -> None:
    """Measure each size and precision, then ranks, and write their sections."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parts = {
        f"{size}, {precision}": partial(section, size, precision, arguments)
        for size, precision in product(arguments.sizes, arguments.precisions)
    }
    parts |= {"Ranks": partial(ranks_section, arguments)} if arguments.ranks else {}
    for name, part in parts.items():
        text = part()
        write_section(name, text, result=arguments.result, title=_TITLE, module="generation")
        log.info("%s\n\n%s", name, text)


if __name__ == "__main__":
    main()
