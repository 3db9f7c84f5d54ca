"""Training on the GPU wherever weights and states rest: the same numbers, in which time, in how much memory."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import zero_run
from benchmarks.gpu_bench import Bench, Tried, failures
from benchmarks.zero_case import Case
from benchmarks.zero_report import table
from rlhf.config.run_config import STAGES

OFFLOADS = {  # of conf/engine: ZeRO stage, where optimizer state and parameters are kept
    "zero0": (0, "none", "none"),
    "zero2_cpu": (2, "cpu", "none"),
    "zero3_cpu": (3, "cpu", "cpu"),
    "zero3_nvme": (3, "nvme", "nvme"),
}
FP32_TOLERANCE, BF16_TOLERANCE = 1e-4, 2e-2
"""Largest relative difference of a loss: the device and the host round an update differently."""


Losses = dict[str, list[float]]
"""Of each part of a run."""


def smoke(bench: Bench) -> str:
    """The pipeline on a tiny model in fp32, with each kind of offloading; losses beside those of zero0."""
    return _beside_zero0(
        bench.together({name: partial(pipeline_losses, bench, name) for name in OFFLOADS}), FP32_TOLERANCE
    )


def parity(bench: Bench) -> str:
    """The same batches in bf16 over fp32 masters with all offloading, beside plain PyTorch bf16 and zero0 fp32."""
    template = Case("ours", "1M", precision="bf16", steps=3, warmup=1, sequences=2, length=16, accumulation=2)
    if not bench.toy:
        template = replace(template, size="125M", steps=8, sequences=16, length=256, device="cuda", threads=4)
    cases = {name: _offloaded(template, name) for name in OFFLOADS}
    cases["plain PyTorch"] = replace(template, contender="plain")
    cases["zero0 in fp32"] = replace(template, precision="fp32")
    what = f"{template.size}, {template.steps} steps of {template.sequences} x {template.length} tokens."
    tried = bench.together({name: partial(training_losses, bench, case) for name, case in cases.items()})
    return f"{what}\n\n{_beside_zero0(tried, BF16_TOLERANCE)}"


def _beside_zero0(tried: dict[str, Tried], tolerance: float) -> str:
    """A table of the largest differences of `Losses`, and a verdict."""
    base: Losses | None = tried["zero0"].value
    parts, rows = list(base or []), []
    for name, one in tried.items():
        if base is None or one.value is None:
            rows.append([name, *("–" for _ in parts), one.reason or "zero0 failed"])
            continue
        apart = [difference(one.value.get(part, []), base[part]) for part in parts]
        rows.append([name, *(f"{value:.1e}" for value in apart), verdict(apart, tolerance)])
    head = ["", *(f"{part}: largest difference of a loss to zero0" for part in parts)]
    return table([*head, f"within {tolerance:.0e}, relative"], rows) + failures(tried)


def pipeline_losses(bench: Bench, engine: str) -> Losses:
    """The losses of each stage in order, training and held out, of `run_pipeline.py experiment=smoke`; toy: one step.

    Raises:
        RuntimeError: it failed.
    """
    place = bench.folder / f"smoke_{engine}"
    words = ["experiment=smoke", f"engine={engine}", f"engine.device={bench.device}", "engine.precision=fp32"]
    words += ["launch.threads=1", "tracking.report=false", f"output_dir={place}"]
    words += ["stage=sft", "sft.max_steps=1"] if bench.toy else []
    bench.run([sys.executable, "run_pipeline.py", *words])
    losses: Losses = {}
    for stage in (stage for stage in STAGES if (place / stage).exists()):
        rows = [json.loads(line) for line in (place / stage / "metrics.jsonl").read_text().splitlines()]
        losses[stage] = [row[key] for row in rows for key in sorted(row) if key.endswith("/loss")]
    return losses


def difference(found: list[float], expected: list[float]) -> float:
    """The largest difference of two lists of losses, relative where they are above 1; NaN where they do not match."""
    if len(found) != len(expected) or not found:
        return math.nan
    apart = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, expected, strict=True)]
    return math.nan if any(map(math.isnan, apart)) else max(apart)


def verdict(differences: list[float], tolerance: float) -> str:
    """Whether all are within a tolerance; NaN is not."""
    return "yes" if all(value <= tolerance for value in differences) else "NO"


def training_losses(bench: Bench, case: Case) -> Losses:
    """Those of each step of a training run."""
    return {"training": _trained(bench, case)["losses"]}


def _trained(bench: Bench, case: Case) -> dict[str, Any]:
    return bench.call(train, case=asdict(case), folder=str(bench.folder))


def train(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """What `zero_run.measure` reports of a training run, and the median seconds of its timed steps."""
    report = zero_run.measure(case, Path(folder))
    return report | {"seconds": statistics.median(report["wall_seconds"][case["warmup"] :])}


def _offloaded(template: Case, name: str) -> Case:
    stage, offload_optimizer, offload_param = OFFLOADS[name]
    return replace(template, stage=stage, offload_optimizer=offload_optimizer, offload_param=offload_param)


SECONDS_OF_A_ROW = {"zero3_nvme": 75.0}
"""What must be left for a row of `step` on a GPU to begin; 25 for the others."""


def step(bench: Bench) -> str:
    """A step in bf16 with weights and states with all offloading, beside plain PyTorch with equal arithmetic."""
    template = Case("ours", "1M", precision="bf16", steps=2, warmup=1, sequences=2, length=16, accumulation=2)
    if not bench.toy:
        template = replace(template, size="1B", steps=5, warmup=2, sequences=32, length=1024, accumulation=4)
        template = replace(template, device="cuda", threads=os.cpu_count() or 1)
    cases = {"plain PyTorch": replace(template, contender="plain")} | {
        name: _offloaded(template, name) for name in OFFLOADS
    }
    # A step of this row moves some 35 GB from and to the disk.
    cases["zero3_nvme"] = replace(cases.pop("zero3_nvme"), steps=2, warmup=1)
    tried = {name: _row(bench, name, case=case) for name, case in cases.items()}
    base = tried["zero0"].value
    rows = [_cells(name, one, base=base, case=cases[name]) for name, one in tried.items()]
    what = (
        f"{template.size}, {template.precision}, {template.sequences} x {template.length} tokens a step in "
        f"{template.accumulation} micro-batches, {template.threads} threads; medians of the steps after "
        f"{template.warmup} to warm up."
    )
    head = ["", "ms a step", "speed / zero0", "tokens/s", "device: tensors MB", "reserved MB", "host MB"]
    return f"{what}\n\n{table([*head, 'largest difference in loss to zero0'], rows)}{failures(tried)}"


def _row(bench: Bench, name: str, *, case: Case) -> Tried:
    needed = 5.0 if bench.toy else SECONDS_OF_A_ROW.get(name, 25.0)
    if bench.left < needed:
        return Tried(None, skipped=f"{bench.left:.0f} s are left, it needs some {needed:.0f}")
    return bench.attempt(partial(_trained, bench.within(2 * needed), case))


def _cells(name: str, one: Tried, *, base: dict[str, Any] | None, case: Case) -> list[str]:
    found = one.value
    if found is None:
        return [name, one.reason, *["–"] * 6]
    fraction = apart = "–"
    if base is not None:
        count = min(len(base["losses"]), len(found["losses"]))
        fraction = f"{base['seconds'] / found['seconds']:.2f}"
        apart = f"{difference(found['losses'][:count], base['losses'][:count]):.1e}"
    sizes = [f"{found[key] / 1e6:.0f}" for key in ("device_peak", "device_reserved", "resident")]
    tokens = case.sequences * case.length / found["seconds"]
    return [name, f"{1e3 * found['seconds']:.0f}", fraction, f"{tokens:.0f}", *sizes, apart]
