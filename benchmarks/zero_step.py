"""A training step per ZeRO stage and offloading: our engine, DeepSpeed with its defaults and tuned, and PyTorch alone.

A round runs every contender once, each in fresh processes; ratios are taken within a round. Left out: GPUs, and more
than one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.zero_case import Case, Outcome
from benchmarks.zero_records import Records
from benchmarks.zero_report import spread, table

ROWS = {  # name: ZeRO stage, where optimizer state and parameters are kept
    "0": (0, "none", "none"),
    "1": (1, "none", "none"),
    "2": (2, "none", "none"),
    "3": (3, "none", "none"),
    "2-cpu": (2, "cpu", "none"),
    "3-cpu": (3, "cpu", "none"),
    "3-cpu-cpu": (3, "cpu", "cpu"),
    "3-nvme": (3, "nvme", "none"),
    "3-nvme-nvme": (3, "nvme", "nvme"),
}
Rounds = list[Outcome | None]


@dataclass
class Row:
    """One line: what every contender did in every round. `base` is our run that keeps all on the device."""

    name: str
    plain: Rounds
    base: Rounds
    ours: Rounds
    peer: Rounds
    tuned: Rounds

    def best_peer(self, number: int, cost: Callable[[Outcome], float]) -> float | None:
        """The lower of DeepSpeed's costs in a round; None when it runs in neither form."""
        found = [rounds[number] for rounds in (self.peer, self.tuned) if number < len(rounds)]
        return min((cost(outcome) for outcome in found if outcome is not None), default=None)


def compare(records: Records, template: Case, *, rows: Sequence[str], rounds: int, peer: bool) -> str:
    """The tables of one size, number of ranks and precision, all taken from `template`."""
    measured: dict[Case, Rounds] = {}
    plain = replace(template, contender="plain", ranks=1, peers=template.ranks)
    lines = {name: _contenders(template, name, peer=peer) for name in dict.fromkeys(["0", *rows])}
    cases = [plain, *(case for line in lines.values() for case in line)]
    for number in range(rounds):
        for case in cases:
            measured.setdefault(case, []).append(records.measure(case, number))
    results = []
    for name in rows:
        own, *others = (measured[case] for case in lines[name])
        default, tuned = [*others, [], []][:2]
        results.append(Row(name, measured[plain], measured[lines["0"][0]], own, default, tuned))
    title = f"### {template.size}, {template.ranks} rank{'s' * (template.ranks > 1)}, {template.precision}"
    title += f", gradients sent in {template.reduction}" if template.reduction else ""
    what = f"{template.sequences} x {template.length} tokens a rank and step, {rounds} alternating rounds."
    cost = measured[plain]
    alone = f"PyTorch alone on one process: {spread(_all(cost, _cpu), 0)} ms, {spread(_all(cost, _peak), 0)} MB."
    return "\n\n".join([title, f"{what} {alone}", _times(results), _memory(results)])


def _contenders(template: Case, name: str, *, peer: bool) -> list[Case]:
    """Ours, DeepSpeed, and DeepSpeed tuned where something is offloaded."""
    stage, offload_optimizer, offload_param = ROWS[name]
    ours = replace(template, stage=stage, offload_optimizer=offload_optimizer, offload_param=offload_param)
    default = replace(ours, contender="deepspeed", settings={})
    tuned = [replace(default, tuned=True)] if offload_optimizer != "none" else []
    return [ours, default, *tuned] if peer else [ours]


def _times(rows: list[Row]) -> str:
    """Milliseconds of process time a step of all ranks, and ratios of that and of wall clock."""
    head = ["ZeRO, offload", "ours, CPU ms", "DeepSpeed", "tuned", "best DeepSpeed / ours", "the same by wall clock"]
    head += ["speed of ZeRO-0", "by wall clock"]
    lines = []
    for row in rows:
        costs = [spread(_all(rounds, _cpu), 0) for rounds in (row.ours, row.peer, row.tuned)]
        ratios = [spread(_against_peer(row, cost)) for cost in (_cpu, _wall)]
        fractions = [
            spread([cost(base) / cost(own) for base, own in zip(row.base, row.ours, strict=True)])
            for cost in (_cpu, _wall)
        ]
        lines.append([row.name, *costs, *ratios, *fractions])
    return table(head, lines)


def _memory(rows: list[Row]) -> str:
    """MB above the imports, the mean of the ranks; and how far the losses are from one plain process."""
    head = [
        "ZeRO, offload",
        "ours, peak MB of a step",
        "DeepSpeed",
        "tuned",
        "best DeepSpeed / ours",
        "ours, at the start",
    ]
    head += ["DeepSpeed", "ours, largest difference in loss", "DeepSpeed", "tuned"]
    lines = []
    for row in rows:
        peaks = [spread(_all(rounds, _peak), 0) for rounds in (row.ours, row.peer, row.tuned)]
        starts = [spread(_all(rounds, _start), 0) for rounds in (row.ours, row.peer)]
        errors = [_loss_error(rounds, row.plain) for rounds in (row.ours, row.peer, row.tuned)]
        lines.append([row.name, *peaks, spread(_against_peer(row, _peak)), *starts, *errors])
    return table(head, lines)


def _against_peer(row: Row, cost: Callable[[Outcome], float]) -> list[float]:
    peers = [row.best_peer(number, cost) for number in range(len(row.ours))]
    return [peer / cost(own) for peer, own in zip(peers, row.ours, strict=True) if peer is not None]


def _loss_error(rounds: Rounds, plain: Rounds) -> str:
    errors = [
        max(abs(a - b) for a, b in zip(outcome.losses, reference.losses, strict=True))
        for outcome, reference in zip(rounds, plain, strict=False)
        if outcome is not None
    ]
    return f"{max(errors):.1e}" if errors else "–"


def _all(rounds: Rounds, cost: Callable[[Outcome], float]) -> list[float]:
    return [cost(outcome) for outcome in rounds if outcome is not None]


def _cpu(outcome: Outcome) -> float:
    return 1e3 * outcome.cpu_seconds


def _wall(outcome: Outcome) -> float:
    return 1e3 * outcome.wall_seconds


def _peak(outcome: Outcome) -> float:
    return outcome.peak_mb


def _start(outcome: Outcome) -> float:
    return outcome.start_peak_mb
