"""Cost of a step as the model grows, per offloading, and training within a memory limit.

Left out: the peer (see `zero_step.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import LlamaForCausalLM

from benchmarks.zero_cap import MemoryCap
from benchmarks.zero_case import Case, run
from benchmarks.zero_records import Records
from benchmarks.zero_report import spread, table
from benchmarks.zero_run import llama
from benchmarks.zero_step import ROWS

STATE_BYTES = 16  # for each parameter: weight and gradient (bf16, or fp32 without a master), master, two moments


def grow(records: Records, template: Case, *, sizes: Sequence[str], rows: Sequence[str], rounds: int) -> str:
    """Milliseconds of a step for each million parameters, and peak memory, by size and offloading."""
    times, memory = [], []
    for name in rows:
        stage, offload_optimizer, offload_param = ROWS[name]
        time_cells, memory_cells = [name], [name]
        for size in sizes:
            case = replace(
                template, size=size, stage=stage, offload_optimizer=offload_optimizer, offload_param=offload_param
            )
            outcomes = [records.measure(case, number) for number in range(rounds)]
            millions = parameters(size) / 1e6
            cpu = spread([1e3 * outcome.cpu_seconds / millions for outcome in outcomes])
            wall = spread([1e3 * outcome.wall_seconds / millions for outcome in outcomes])
            time_cells.append(f"{cpu}; {wall}")
            memory_cells.append(spread([outcome.peak_mb for outcome in outcomes], 0))
        times.append(time_cells)
        memory.append(memory_cells)
    head = ["ZeRO, offload", *(f"{size} ({parameters(size) / 1e6:.0f} M)" for size in sizes)]
    what = (
        f"{template.precision}, {template.ranks} rank(s), {template.sequences} x {template.length} tokens, "
        f"{rounds} rounds. A step's milliseconds for each million parameters, CPU; wall clock:"
    )
    return "\n\n".join([what, table(head, times), "Peak MB of a step above the imports:", table(head, memory)])


def train_capped(case: Case, *, folder: Path, limit: int) -> str:
    """Train with and without a memory limit: the losses of both, and what was used.

    Args:
        case: of ours.
        folder: for offloading to NVMe.
        limit: bytes that all processes together may use: code, imports, buffers and page cache included.
    """
    count = parameters(case.size)
    states = count * STATE_BYTES
    free = run(case, folder=folder)
    with MemoryCap(limit) as cap:
        capped = run(case, folder=folder, cap=cap)
        highest, kind = cap.highest(), cap.kind
    used = "" if highest is None else f" (highest use with the page cache: {highest / 1e6:.0f} MB)"
    what = (
        f"{count / 1e6:.0f} M parameters, {case.precision}, {case.ranks} rank(s), ZeRO-{case.stage}, optimizer on "
        f"{case.offload_optimizer}, parameters on {case.offload_param}, {case.sequences} x {case.length} tokens. Model "
        f"states of {STATE_BYTES} bytes a parameter: {states / 1e6:.0f} MB, {states / limit:.1f} times the limit of "
        f"{limit / 1e6:.0f} MB ({kind}){used}."
    )
    difference = max(abs(a - b) for a, b in zip(free.losses, capped.losses, strict=True))
    rows = [
        [name, f"{outcome.peak_mb:.0f}", f"{outcome.start_peak_mb:.0f}", f"{outcome.wall_seconds:.2f}"]
        for name, outcome in (("uncapped", free), ("capped", capped))
    ]
    costs = table(["", "peak MB of a step above the imports", "at the start", "s of a step"], rows)
    steps = [
        [str(number), f"{a:.6f}", f"{b:.6f}"]
        for number, (a, b) in enumerate(zip(free.losses, capped.losses, strict=True))
    ]
    curve = table(["step", "loss, uncapped", "loss, capped"], steps)
    return "\n\n".join([what, costs, f"Largest difference in loss: {difference:.1e}.", curve])


def parameters(size: str) -> int:
    """How many a model of this name has."""
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LlamaForCausalLM(llama(size)).parameters())
