"""What ZeRO costs here: disk, CPU Adam, steps by ZeRO stage and offloading, growth, narrow state, a memory limit, CUDA.

Run the parts one at a time, each replaces its section of `benchmarks/results/zero.md`:

    python -m benchmarks.zero disk
    python -m benchmarks.zero adam --peer PYTHON
    python -m benchmarks.zero step --peer PYTHON --sizes 25M 125M --ranks 1 2 --precisions fp32 bf16
    python -m benchmarks.zero step --peer PYTHON --sizes 25M --ranks 2 --precisions bf16 --reductions fp32 bf16
    python -m benchmarks.zero engines --peer PYTHON
    python -m benchmarks.zero growth
    python -m benchmarks.zero state
    python -m benchmarks.zero capped --size 500M --limit-mb 1500
    python -m benchmarks.zero offload --sizes 500M 1B        (on a CUDA device)

PYTHON is an interpreter with torch, transformers, deepspeed and ninja (`pip install deepspeed==0.19.8 ninja`;
`libaio-dev` for NVMe): it compiles its operators on first use, some minutes. Without it the peer is skipped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

from benchmarks import zero_adam, zero_disk, zero_engines, zero_growth, zero_offload, zero_state, zero_step
from benchmarks.zero_case import Case, Outcome, run
from benchmarks.zero_records import Records
from benchmarks.zero_report import RESULT, write_section

log = logging.getLogger(__name__)


def disk(arguments: argparse.Namespace) -> str:
    """GB/s of tiles on disk against bare sequential requests."""
    return zero_disk.compare(
        arguments.folder,
        nbytes=int(arguments.gigabytes * 1e9),
        tile=arguments.buffer_size * 4 // 4096 * 4096,
        buffers=arguments.buffer_count,
        rounds=arguments.rounds,
    )


def adam(arguments: argparse.Namespace) -> str:
    """GB/s of AdamW on the CPU against an in-place pass over memory, and against DeepSpeed."""
    sizes = {"elements": arguments.elements, "rounds": arguments.rounds}
    return "\n\n".join(zero_adam.compare(arguments.peer, **sizes, threads=threads) for threads in arguments.threads)


def step(arguments: argparse.Namespace) -> str:
    """Time and memory of a training step per ZeRO stage and offloading."""
    skipped = [] if arguments.peer else ["DeepSpeed was skipped: no Python with it was named (--peer)."]
    texts = [
        zero_step.compare(
            _records(arguments),
            replace(_template(arguments, size=size, ranks=ranks, precision=precision), reduction=reduction),
            rows=arguments.rows,
            rounds=arguments.rounds,
            peer=arguments.peer is not None,
        )
        for size, ranks, precision, reduction in product(
            arguments.sizes, arguments.ranks, arguments.precisions, arguments.reductions
        )
    ]
    return "\n\n".join([*skipped, *texts])


def engines(arguments: argparse.Namespace) -> str:
    """A step of ours, of FSDP2 by itself and of DeepSpeed, side by side."""
    template = _template(arguments, size=arguments.size, ranks=arguments.ranks, precision=arguments.precision)
    peers = ["fsdp2", *(["deepspeed"] if arguments.peer else [])]
    return zero_engines.compare(_records(arguments), template, peers=peers, rounds=arguments.rounds)


def growth(arguments: argparse.Namespace) -> str:
    """Cost of a step as parameters grow."""
    return zero_growth.grow(
        _records(arguments),
        _template(arguments, size="", ranks=1, precision=arguments.precision),
        sizes=arguments.sizes,
        rows=arguments.rows,
        rounds=arguments.rounds,
    )


def state(arguments: argparse.Namespace) -> str:
    """Bytes and time of optimizer state, by how it is stored."""
    template = _template(arguments, size=arguments.size, ranks=1, precision="bf16")
    return zero_state.compare(_records(arguments), template, elements=arguments.elements, rounds=arguments.rounds)


def capped(arguments: argparse.Namespace) -> str:
    """Training with model states far larger than the memory."""
    stage, offload_optimizer, offload_param = zero_step.ROWS["3-nvme-nvme"]
    template = _template(arguments, size=arguments.size, ranks=arguments.ranks, precision=arguments.precision)
    fields = {**vars(template), "stage": stage, "offload_optimizer": offload_optimizer, "offload_param": offload_param}
    return zero_growth.train_capped(Case(**fields), folder=arguments.folder, limit=int(arguments.limit_mb * 1e6))


def offload(arguments: argparse.Namespace) -> str:
    """Speed of a step on a CUDA device with its states elsewhere, as a fraction of the speed with them there."""
    zero_offload.require_cuda()
    texts = []
    for size in arguments.sizes:
        case = _template(arguments, size=size, ranks=1, precision=arguments.precision)
        case = replace(case, accumulation=arguments.accumulation)
        texts.append(zero_offload.compare(_records(arguments), case, rows=arguments.rows, rounds=arguments.rounds))
    return "\n\n".join(texts)


def _template(arguments: argparse.Namespace, *, size: str, ranks: int, precision: str) -> Case:
    buffers = {"buffer_count": arguments.buffer_count, "buffer_size": arguments.buffer_size}
    return Case(
        "ours",
        size,
        ranks=ranks,
        precision=precision,
        steps=arguments.steps,
        warmup=min(2, arguments.steps - 1),
        sequences=arguments.sequences,
        length=arguments.length,
        settings=buffers,
    )


def _records(arguments: argparse.Namespace) -> Records:
    def runner(case: Case) -> Outcome:
        python = arguments.peer if case.contender == "deepspeed" else sys.executable
        return run(case, folder=arguments.folder, python=python)

    return Records(arguments.records, runner=runner)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for action in (disk, adam, step, engines, growth, state, capped, offload):
        part = parts.add_parser(action.__name__, help=action.__doc__)
        part.set_defaults(action=action)
        part.add_argument("--folder", type=Path, default=Path("outputs/zero"), help="on the disk to use")
        part.add_argument("--result", type=Path, default=RESULT, help="Markdown file whose section is replaced")
        part.add_argument("--rounds", type=int, default=3)
        part.add_argument("--buffer-count", type=int, default=4)
        part.add_argument("--buffer-size", type=int, default=8_000_000, help="elements of four bytes")
        if action in (step, engines, growth, state, capped, offload):
            _add_training(part)
    parts.choices["disk"].add_argument("--gigabytes", type=float, default=2.0)
    for name, elements in (("adam", 100_000_000), ("state", 20_000_000)):
        parts.choices[name].add_argument("--elements", type=int, default=elements)
    parts.choices["adam"].add_argument("--threads", type=int, nargs="+", default=[1])
    for name in ("adam", "step", "engines"):
        parts.choices[name].add_argument("--peer", help="interpreter with deepspeed")
    for name in ("step", "growth"):
        parts.choices[name].add_argument("--rows", nargs="+", choices=zero_step.ROWS, default=list(zero_step.ROWS))
    parts.choices["step"].add_argument("--sizes", nargs="+", default=["25M", "125M"])
    parts.choices["step"].add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parts.choices["step"].add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    types = "in which gradients are sent, fp32 or bf16; without it each contender's own"
    parts.choices["step"].add_argument("--reductions", nargs="+", default=[""], help=types)
    parts.choices["growth"].add_argument("--sizes", nargs="+", default=["25M", "60M", "125M", "250M", "500M"])
    for name in ("engines", "growth", "capped", "offload"):
        parts.choices[name].add_argument("--precision", default="bf16")
    _add_offload(parts.choices["offload"])
    for name, size in (("engines", "25M"), ("state", "125M")):
        parts.choices[name].add_argument("--size", default=size)
    parts.choices["engines"].add_argument("--ranks", type=int, default=2)
    parts.choices["state"].set_defaults(steps=4, sequences=2, length=16)
    parts.choices["capped"].add_argument("--size", default="500M")
    parts.choices["capped"].add_argument("--ranks", type=int, default=1)
    parts.choices["capped"].add_argument("--limit-mb", type=float, default=1500)
    return parser


def _add_training(part: argparse.ArgumentParser) -> None:
    part.add_argument("--steps", type=int, default=6)
    part.add_argument("--sequences", type=int, default=2)
    part.add_argument("--length", type=int, default=128)
    part.add_argument("--records", type=Path, default=Path("outputs/zero/records.jsonl"))


def _add_offload(part: argparse.ArgumentParser) -> None:
    part.add_argument("--sizes", nargs="+", default=["500M", "1B"])
    part.add_argument("--rows", nargs="+", choices=zero_offload.ROWS, default=list(zero_offload.ROWS))
    part.add_argument("--accumulation", type=int, default=8)
    part.set_defaults(sequences=64, length=1024)


def main() -> None:
    """Measure one part and write its section."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.folder = arguments.folder.resolve()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    text = arguments.action(arguments)
    write_section(arguments.part, text, result=arguments.result)
    log.info("%s", text)


if __name__ == "__main__":
    main()
