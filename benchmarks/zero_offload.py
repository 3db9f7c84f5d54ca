"""A training step on a CUDA device whose states rest elsewhere, against the same step with everything on the device.

A round runs every row once, each in a fresh process; fractions are taken within a round. Left out: several devices.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.zero_case import Case, Outcome
from benchmarks.zero_records import Records
from benchmarks.zero_report import spread, table

AIM = 0.6  # of the speed without offloading, with the optimizer on the host
ROWS = {
    "device": {},
    "cpu": {"offload_optimizer": "cpu"},
    "cpu, weights too": {"offload_optimizer": "cpu", "offload_param": "cpu"},
    "nvme": {"offload_optimizer": "nvme"},
}


def require_cuda() -> None:
    """End the program where there is nothing to measure."""
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks.zero offload: found no CUDA device, expected one; on a CPU machine the optimizer's host memory "
            "is the device's memory, and `python -m benchmarks.zero step` measures the others."
        )


def compare(records: Records, template: Case, *, rows: Sequence[str], rounds: int) -> str:
    """The table of one size; `template` has ZeRO stage 3 and the batch."""
    template = replace(template, stage=3, device="cuda", threads=os.cpu_count() or 1)
    names = list(dict.fromkeys(["device", *rows]))
    measured: dict[str, list[Outcome]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            case = replace(template, **ROWS[name])
            outcome = records.measure(case, number)
            assert outcome is not None, "only a peer may be missing"
            measured[name].append(outcome)
    what = (
        f"{template.size}, {template.precision}, one {_device()}, {template.threads} threads, {template.sequences} x "
        f"{template.length} tokens a step in {template.accumulation} micro-batch(es), {rounds} alternating rounds. "
        f"The aim with the optimizer on the host: {AIM:.2f} of the speed without offloading."
    )
    head = [
        "states on",
        "ms a step",
        "speed / all on the device",
        "tokens/s",
        "device MB",
        "largest difference in loss",
    ]
    return "\n\n".join([what, table(head, [_line(name, measured, template) for name in names])])


def _line(name: str, measured: dict[str, list[Outcome]], template: Case) -> list[str]:
    own, base = measured[name], measured["device"]
    seconds = [outcome.wall_seconds for outcome in own]
    fractions = [there.wall_seconds / here.wall_seconds for there, here in zip(base, own, strict=True)]
    tokens = template.sequences * template.length
    runs = zip(own, base, strict=True)
    errors = [abs(a - b) for here, there in runs for a, b in zip(here.losses, there.losses, strict=True)]
    return [
        name,
        spread([1e3 * value for value in seconds], 0),
        spread(fractions),
        spread([tokens / value for value in seconds], 0),
        spread([outcome.device_mb for outcome in own], 0),
        f"{max(errors):.1e}",
    ]


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CUDA device"
