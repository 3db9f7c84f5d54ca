"""Optimizer state in fewer bytes: memory of a whole step beside the plan's, and time of AdamW alone.

Memory is that of a process that trains; what it computes is kept short, so that states outweigh activations. Time is
process time of the kernel, all formats in turn in one process, which `python -m benchmarks.zero_state N ROUNDS` is.
Left out: what narrower types do to training (`python -m benchmarks.state_curves`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.zero_case import ROOT, Case
from benchmarks.zero_growth import parameters
from benchmarks.zero_records import Records
from benchmarks.zero_report import spread, table
from benchmarks.zero_run import llama
from rlhf.config.engine_config import EngineConfig
from rlhf.config.roles import ModelKind
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.adam_kernel import AdamKernel, ParameterSlice
from rlhf.engine.state_format import BLOCK, STATE_KEYS, Quantised, SplitMaster, StateFormat, Stored, num_blocks
from rlhf.memory_plan.states import States
from rlhf.memory_plan.trace import ModelShape

SPLIT, SUMS = {"master_weights": "split"}, {"grad_accum_dtype": "bf16"}
KINDS: dict[str, dict[str, str]] = {
    "fp32": {},
    "bf16 moments": {"moments": "bf16"},
    "8-bit moments": {"moments": "int8"},
    "split masters": SPLIT,
    "split masters, bf16 moments": SPLIT | {"moments": "bf16"},
    "split masters, 8-bit moments": SPLIT | {"moments": "int8"},
}
_TENSORS = 4


def compare(records: Records, template: Case, *, elements: int, rounds: int) -> str:
    """Two tables: bytes of a parameter, measured and planned, and nanoseconds of its update."""
    rows = []
    for name, accumulation, settings in _cases():
        case = replace(template, stage=1, accumulation=accumulation, settings=template.settings | settings)
        outcomes = [records.measure(case, number) for number in range(rounds)]
        found = [1e6 * outcome.peak_mb / parameters(template.size) for outcome in outcomes]
        planned = planned_bytes(template.size, settings, accumulation=accumulation)
        seconds = [1e3 * outcome.cpu_seconds for outcome in outcomes]
        rows.append([name, str(accumulation), f"{planned:.2f}", spread(found), spread(seconds, 0)])
    head = ["optimizer state", "micro-batches", "planned bytes", "measured bytes", "CPU ms of a step"]
    what = (
        f"{parameters(template.size) / 1e6:.0f} M parameters in bf16, one rank, {template.sequences} x "
        f"{template.length} tokens, {rounds} rounds. Bytes of a parameter: working weight, gradient, master and "
        "moments; measured, the highest of the process above its start, with activations, logits and code:"
    )
    return "\n\n".join([what, table(head, rows), _update_times(elements, rounds)])


def planned_bytes(size: str, settings: dict[str, Any], *, accumulation: int) -> float:
    """Bytes of a parameter at rest and with all gradients, by the memory plan."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(llama(size).to_dict() | {"architectures": ["Llama"]}))
        states = States(
            role="model",
            spec=ModelShape(folder, ModelKind.causal_lm).whole,
            engine=EngineConfig(zero_stage=1, **settings),
            ranks=1,
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            micro_batches=accumulation,
        )
        return sum(item.bytes for item in [*states.at_rest(), *states.gradients()]) / parameters(size)


def _cases() -> Iterator[tuple[str, int, dict[str, str]]]:
    for name, settings in KINDS.items():
        yield name, 1, settings
    yield "fp32", 2, {}
    yield "fp32, bf16 sums", 2, SUMS
    yield "split masters, 8-bit moments, bf16 sums", 2, SPLIT | SUMS | {"moments": "int8"}


def _update_times(elements: int, rounds: int) -> str:
    command = [sys.executable, "-m", "benchmarks.zero_state", str(elements), str(rounds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    seconds: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    whole = seconds["fp32"]
    rows = [
        [name, spread([1e9 * t / elements for t in times]), spread([t / w for t, w in zip(times, whole, strict=True)])]
        for name, times in seconds.items()
    ]
    what = f"AdamW alone, {elements / 1e6:.0f} M elements with bf16 gradients and weights, one thread, in turn:"
    return "\n\n".join([what, table(["optimizer state", "ns an element", "times fp32"], rows)])


def measure(elements: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of an update by kind and round; a first round is dropped."""
    updates = {name: update_of(settings, elements) for name, settings in KINDS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for number in range(rounds + 1):
        for name, update in updates.items():
            start = time.process_time()
            update()
            if number > 0:
                seconds[name].append(time.process_time() - start)
    return seconds


def update_of(settings: dict[str, Any], elements: int) -> Callable[[], None]:
    """An update of `elements` weights and their working copies in bf16."""
    format_ = StateFormat.of(EngineConfig(zero_stage=0, **settings), torch.bfloat16)
    kernel, numel, step = (
        AdamKernel(OptimizerConfig(lr=1e-4), torch.device("cpu")),
        elements // _TENSORS,
        torch.ones(()),
    )
    working = [torch.randn(numel).mul_(0.02).bfloat16() for _ in range(_TENSORS)]
    slices = []
    for index, weights in enumerate(working):
        state = [_empty(format_, key, weights) for key in STATE_KEYS]
        gradient = torch.randn(numel).mul_(1e-3).bfloat16()
        slices.append(ParameterSlice(str(index), 0, True, step, state[0], gradient, *state[1:]))

    def update() -> None:
        for chunk in kernel.update(slices, lr=1e-4, scale=0.5):
            for part in chunk:
                working[int(part.name)][part.start : part.start + part.weight.numel()].copy_(part.weight)

    return update


def _empty(format_: StateFormat, key: str, working: torch.Tensor) -> Stored:
    if key == "weight":
        low = torch.zeros(working.numel(), dtype=torch.int16)
        return SplitMaster(low, working.__getitem__) if format_.is_split else working.float()
    if not format_.is_quantised:
        return torch.zeros(working.numel(), dtype=format_.dtype(key))
    blocks = num_blocks(working.numel())
    codes = torch.zeros(blocks * BLOCK, dtype=format_.dtype(key))
    return Quantised(codes, torch.zeros(blocks), working.numel())


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))) + "\n")
