"""What ranks send and hold of a rollout: as it travels here, beside gathering all of it on every rank.

    python -m benchmarks.rollout_rows

A rollout of 512 rows of 256 + 256 tokens, with the hidden states that frozen layers gave (576 numbers a token in bf16,
the width of SmolLM2-135M), and epochs of minibatches of 64 rows. Bytes are counted where they are given to
collectives, as those that have to leave a rank: all it has for each other rank. Memory is what the process gains at
most, beside the rows that it made itself: rows, and copies of them on their way. Beside both stands what arithmetic
expects, of the rows alone.
Left out: models, networks, time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.rounds import ROOT
from benchmarks.zero_report import table, write_section
from benchmarks.zero_run import forget_highest_resident, highest_resident, resident
from rlhf.row_exchange import fetched, gather_rollout, tensors_of
from rlhf.runtime.dist import World, gather_objects, start, stop
from rlhf.types import HeldRows, Rollout, Sequences

RESULT = ROOT / "benchmarks/results/rollout_rows.md"
_TITLE = "# What ranks send and hold of a rollout\n"
EPOCHS = 4
_PER_TOKEN = 6  # numbers in fp32 of each response token: log-probabilities, values, KL, entropy


class Shape(NamedTuple):
    """A rollout of all ranks."""

    rows: int = 512
    prompt: int = 256
    response: int = 256
    width: int = 576
    """Of the hidden states."""
    minibatch: int = 64

    @property
    def numbers(self) -> int:
        """Bytes of a row that go everywhere: of the response's tokens, its id, length and scores, whether it ended."""
        return self.response * (1 + 4 * _PER_TOKEN) + 8 + 8 + 3 * 4 + 1

    @property
    def sequence(self) -> int:
        """Bytes of a row that go to the rank that trains on it: ids, mask and hidden states."""
        return (self.prompt + self.response) * (8 + 1 + 2 * self.width)


def made(shape: Shape, *, rows: int, rank: int) -> Rollout:
    """The rows of one rank."""
    length = shape.prompt + shape.response
    mask = torch.ones(rows, length, dtype=torch.bool)
    texts = ("",) * rows
    states = tuple(torch.full((length, shape.width), float(rank)).bfloat16() for _ in range(rows))
    own = Sequences(torch.ones(rows, length, dtype=torch.int64), mask, texts, texts, actor_states=states)
    names = ("logprobs", "reference_logprobs", "generation_logprobs", "values", "kl", "entropy")
    return Rollout(
        held=HeldRows.of(own, mask.sum(-1)),
        response_mask=mask[:, shape.prompt :].clone(),
        sample_ids=torch.arange(rows) + rank * rows,
        **{name: torch.zeros(rows, shape.response) for name in names},
        source_scores=torch.zeros(rows, 1),
        raw_scores=torch.zeros(rows),
        scores=torch.zeros(rows),
        ended=torch.ones(rows, dtype=torch.bool),
    )


def as_here(rollout: Rollout, shape: Shape, *, world: World) -> None:
    """Gather the numbers, then bring each minibatch's sequences to the rank that trains on them, in every epoch."""
    whole = gather_rollout(rollout, pad_id=0, world=world)
    for epoch in range(EPOCHS):
        order = torch.randperm(shape.rows, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(shape.minibatch):
            held = whole.held.rows(rows)
            fetched(held, list(torch.arange(len(rows)).tensor_split(world.size)))


def everything(rollout: Rollout, shape: Shape, *, world: World) -> None:
    """Gather all of it as messages; minibatches need nothing more."""
    own = rollout.held.own
    mine = tensors_of(rollout) | tensors_of(own) | {"states": own.actor_states, "tokens": rollout.held.num_tokens}
    parts = gather_objects(mine)
    names = [name for name in mine if name != "states"]
    whole = {name: torch.cat([part[name] for part in parts]) for name in names}
    whole["states"] = [rows for part in parts for rows in part["states"]]
    assert len(whole["states"]) == shape.rows


WAYS: dict[str, Callable[..., None]] = {"as here": as_here, "everything everywhere": everything}


def expected(shape: Shape, way: str, *, ranks: int) -> dict[str, float]:
    """MB that leave a rank in all epochs, and MB of rows that it holds at most beside its own."""
    mine, away = shape.rows / ranks, (ranks - 1) / ranks
    if way == "everything everywhere":
        row = shape.numbers + shape.sequence
        return {"sent": mine * (ranks - 1) * row / 1e6, "gained": shape.rows * row / 1e6}
    moved = EPOCHS * mine * away * shape.sequence
    minibatch = shape.minibatch / ranks * shape.sequence
    return {
        "sent": (mine * (ranks - 1) * shape.numbers + moved) / 1e6,
        "gained": (shape.rows * shape.numbers + minibatch * away) / 1e6,
    }


def count_sent() -> list[int]:
    """From now on, collect the bytes that each collective has to bring from this rank to the others."""
    found: list[int] = []
    ranks, rank = dist.get_world_size(), dist.get_rank()

    def counted(name: str, size: Callable[..., int]) -> None:
        collective = getattr(dist, name)

        def call(*arguments: Any, **words: Any) -> Any:
            found.append(size(*arguments))
            return collective(*arguments, **words)

        setattr(dist, name, call)

    def exchanged(_: Tensor, rows: Tensor, __: list[int], sizes: list[int]) -> int:
        return rows[0].nbytes * (sum(sizes) - sizes[rank]) if len(rows) else 0

    counted("all_gather_into_tensor", lambda _, mine: mine.nbytes * (ranks - 1))
    counted("all_gather", lambda _, mine: mine.nbytes * (ranks - 1))
    counted("all_reduce", lambda mine: 2 * mine.nbytes * (ranks - 1) // ranks)
    counted("all_to_all_single", exchanged)
    return found


def measure(shape: Shape, *, ranks: int) -> dict[str, dict[str, float]]:
    """By way: MB that left a rank and MB that it gained at most, the largest of the ranks."""
    found = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command += ["-m", "benchmarks.rollout_rows", "--rank", json.dumps([way, shape, folder])]
            variables = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *command], cwd=ROOT, env=variables, check=True, stdout=sys.stderr)
            reports = [json.loads(file.read_text()) for file in Path(folder).iterdir()]
        found[way] = {name: max(report[name] for report in reports) for name in reports[0]}
    return found


def _measure_rank(way: str, shape: Shape, folder: str) -> None:
    world = start("cpu")
    rollout = made(shape, rows=shape.rows // world.size, rank=world.rank)
    WAYS[way](made(shape._replace(rows=world.size), rows=1, rank=0), shape._replace(rows=world.size), world=world)
    sent, before = count_sent(), resident()
    forget_highest_resident()
    WAYS[way](rollout, shape, world=world)
    report = {"sent": sum(sent) / 1e6, "gained": (highest_resident() - before) / 1e6}
    (Path(folder) / str(world.rank)).write_text(json.dumps(report))
    stop()


def compared(shape: Shape, ranks: int, found: dict[str, dict[str, float]]) -> str:
    """A table of both ways."""
    rows = []
    for way, measured in found.items():
        by_hand = expected(shape, way, ranks=ranks)
        rows.append([way, *(f"{values[name]:.1f}" for name in ("sent", "gained") for values in (by_hand, measured))])
    head = [
        "",
        f"sent by a rank in {EPOCHS} epochs, MB: expected",
        "measured",
        "gained by a rank, MB: expected",
        "measured",
    ]
    return table(head, rows)


def main() -> None:
    """Measure two and four ranks and write their sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--result", type=Path, default=RESULT, help="Markdown file whose sections are replaced")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        way, shape, folder = json.loads(arguments.rank)
        _measure_rank(way, Shape(*shape), folder)
        return
    for ranks in arguments.ranks:
        text = compared(Shape(), ranks, measure(Shape(), ranks=ranks))
        write_section(f"{ranks} ranks", text, result=arguments.result, title=_TITLE, module="rollout_rows")
        sys.stdout.write(f"{ranks} ranks\n\n{text}\n")


if __name__ == "__main__":
    main()
