"""A training step of three engines on the same batches: ours, PyTorch's FSDP2 by itself, and DeepSpeed.

FSDP2 has no ZeRO 1, and its offload of parameters needs a device; so the rows are ZeRO 2 and 3 on several ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.zero_case import Case, Outcome
from benchmarks.zero_records import Records
from benchmarks.zero_report import spread, table

_STAGES = (2, 3)
_NAMES = {"ours": "ours", "fsdp2": "FSDP2", "deepspeed": "DeepSpeed"}


def compare(records: Records, template: Case, *, peers: Sequence[str], rounds: int) -> str:
    """The table of one size; `peers` run beside ours in every round, and ratios are taken within a round."""
    rows = []
    plain = replace(template, contender="plain", ranks=1, peers=template.ranks, settings={})
    cases = {
        stage: [
            replace(template, stage=stage),
            *(replace(template, contender=p, stage=stage, settings={}) for p in peers),
        ]
        for stage in _STAGES
    }
    measured: dict[Case, list[Outcome | None]] = {}
    for number in range(rounds):
        for case in [plain, *(case for row in cases.values() for case in row)]:
            measured.setdefault(case, []).append(records.measure(case, number))
    for stage, row in cases.items():
        own, *others = ([outcome for outcome in measured[case] if outcome is not None] for case in row)
        for case, found in zip(row, [own, *others], strict=True):
            ratios = [peer.cpu_seconds / ours.cpu_seconds for peer, ours in zip(found, own, strict=False)]
            rows.append(
                [
                    f"{stage}",
                    _NAMES[case.contender],
                    spread([1e3 * outcome.cpu_seconds for outcome in found], 0),
                    spread([1e3 * outcome.wall_seconds for outcome in found], 0),
                    spread(ratios),
                    spread([outcome.peak_mb for outcome in found], 0),
                    _difference(found, [outcome for outcome in measured[plain] if outcome is not None]),
                ]
            )
    head = [
        "ZeRO",
        "engine",
        "CPU ms of a step",
        "wall ms",
        "CPU time of ours",
        "peak MB",
        "largest difference in loss",
    ]
    what = f"{template.size} parameters, {template.ranks} ranks, {template.precision}, {template.sequences} x "
    what += f"{template.length} tokens a rank, {rounds} alternating rounds; losses against PyTorch in one process."
    return f"{what}\n\n{table(head, rows)}"


def _difference(found: list[Outcome], plain: list[Outcome]) -> str:
    pairs = [pair for run in found for pair in zip(run.losses, plain[0].losses, strict=True)]
    return f"{max(abs(a - b) for a, b in pairs):.1e}" if pairs else "–"
