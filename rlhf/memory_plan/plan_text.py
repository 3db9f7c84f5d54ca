"""Shows a plan, refuses a run that does not fit, and at the end of a stage compares the plan with what was measured.

The plan is printed and written to `plan.txt`, its numbers to `plan.json`. Left out: how they are computed
(`planner.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf.config.run_config import RunConfig
from rlhf.engine.materialize import working_dtype
from rlhf.memory_plan.kernels import compiled_kernels
from rlhf.memory_plan.limits import cheapest_changes, full_disks, limits_of
from rlhf.memory_plan.plan import Item, Limits, Phase, Place, Plan
from rlhf.memory_plan.planner import Machine, machine_of, plan_stage
from rlhf.runtime.atomic_files import read_json, write_text
from rlhf.runtime.dist import World, barrier
from rlhf.runtime.launch import under_torchrun
from rlhf.tracking.text_table import table
from rlhf.tracking.timing import Stopwatch, resident

log = logging.getLogger(__name__)

RUNTIME, KERNELS = "runtime", "compiled kernels"
_TEXT, _NUMBERS = "plan.txt", "plan.json"
_CUDA_CONTEXT = 600_000_000  # bytes of a process on an H100 before its first tensor: context, kernels, cuBLAS


def check_memory(run: RunConfig, stages: list[str], *, ranks: int) -> None:
    """Print the plan of the stages, write it to the output folder, and refuse what cannot fit.

    Raises:
        ValueError: a stage does not fit, and `memory.enforce` is true; what would make it fit.
    """
    machine, limits = _here(run, ranks, stages=stages)
    plans = [plan_stage(run, stage, machine=machine) for stage in stages]
    log.info("%s", short_text(plans, limits))
    verdicts = {plan.stage: verdict(run, plan, machine=machine, limits=limits) for plan in plans}
    texts = [f"{full_text(plan, limits)}\n{verdicts[plan.stage]}\n" for plan in plans]
    write_text(Path(run.output_dir) / _TEXT, "\n".join(texts))
    found = {plan.stage: numbers(plan) for plan in plans}
    write_text(Path(run.output_dir) / _NUMBERS, json.dumps(found, indent=2) + "\n")
    refused = [verdicts[plan.stage] for plan in plans if plan.shortages(limits)]
    refused += [sentence for plan in plans for sentence in full_disks(run, plan)]
    if refused and run.memory.enforce:
        raise ValueError("\n".join([*refused, "memory.enforce=false starts it all the same."]))
    for sentence in refused:
        log.warning("%s", sentence)


def show_plan(run: RunConfig, world: World, *, ranks: int) -> None:
    """Print the whole plan; all ranks may call it.

    Raises:
        ValueError: a model that is not there, or a device whose size nobody knows.
    """
    if world.is_main:
        log.info("%s", plan_text(run, ranks=ranks))
    barrier()


def plan_text(run: RunConfig, *, ranks: int) -> str:
    """The whole plan of a run that need not be possible here."""
    machine, limits = _here(run, ranks, stages=run.stages)
    plans = [plan_stage(run, stage, machine=machine) for stage in run.stages]
    texts = [f"{full_text(plan, limits)}\n{verdict(run, plan, machine=machine, limits=limits)}" for plan in plans]
    return "\n\n".join(texts + [f"{use}: has no plan; its models are frozen" for use in run.uses])


def full_text(plan: Plan, limits: Limits) -> str:
    """Every part of every role in every phase, in a table for each place."""
    where = "CUDA" if plan.is_cuda else "CPU"
    lines = [f"{plan.stage}: {plan.ranks} rank{'s' * (plan.ranks > 1)} of this machine on {where}; GB of each rank"]
    for place, available in limits.by_place():
        rows = list(_rows(plan, place))
        if len(rows) > 1:
            columns = ["role", "part", *(phase.name for phase in plan.phases)]
            shared = "" if place is Place.device else " by all ranks together"
            title = f"{_name(place, limits)}, {_gb(available)} available{shared}"
            lines += ["", table(title, columns, rows=rows)]
    return "\n".join(lines)


def _override(stage: str, name: str, *, value: Any) -> str:
    """A setting of a change as it is written on the command line."""
    where = "" if name.startswith("checkpoint.") else f"{stage}."
    return f"{where}{name}={str(value).lower() if isinstance(value, bool) else value}"


def verdict(run: RunConfig, plan: Plan, *, machine: Machine, limits: Limits) -> str:
    """One or two sentences: whether the stage fits, and what would make it fit."""
    largest = plan.largest
    needs = _gb(plan.needed(largest, plan.main_place))
    start = f"{plan.stage}: the largest phase is {largest.name} with {needs} of {plan.main_place}"
    shortages = plan.shortages(limits)
    if not shortages:
        full = [] if run.memory.disk_gb is not None else full_disks(run, plan)
        return f"{start}; it does not fit on its disks. {' '.join(full)}" if full else f"{start}; it fits."
    worst, stage = shortages[0], str(run.stage_of(plan.stage))
    start += (
        f"; it does not fit: {worst.phase} needs {_gb(worst.needed)} of {worst.place}, found {_gb(worst.available)}."
    )
    plan_again = partial(plan_stage, stage=stage, machine=machine)
    changes = cheapest_changes(run, stage, plan=plan_again, limits=limits, ranks=machine.ranks)
    if not changes:
        return f"{start} No setting of the engine makes it fit: use shorter sequences, a smaller model, or more ranks."
    changed = {name: value for change in changes for name, value in change.settings.items()}
    settings = " ".join(_override(stage, name, value=value) for name, value in changed.items())
    costs = "; ".join(dict.fromkeys(change.cost for change in changes))
    return f"{start} The cheapest change that makes it fit: {settings} ({costs})."


def short_text(plans: list[Plan], limits: Limits) -> str:
    """A line for each phase of each plan."""
    places = [place for place, _ in limits.by_place()]
    rows = [
        [plan.stage, phase.name, *(phase.total(place) / 1e9 for place in places), _largest_parts(phase)]
        for plan in plans
        for phase in plan.phases
    ]
    runtime = {item.place: item.bytes for phase in plans[0].phases for item in phase.items if item.part == RUNTIME}
    own = " and ".join(f"{count / 1e9:.2g} GB of {place}" for place, count in runtime.items())
    title = f"Memory plan: GB of each rank, of which the process takes {own} without a model"
    return table(title, ["stage", "phase", *(_name(place, limits) for place in places), "mostly"], rows=rows)


def numbers(plan: Plan) -> dict[str, dict[str, int]]:
    """Bytes of each phase by place, as they are measured: on a device tensors alone, not the context around them."""
    contexts = [item.bytes for item in plan.phases[0].items if (item.part, item.place) == (RUNTIME, Place.device)]
    around = {Place.device: sum(contexts)}
    return {
        phase.name: {str(place): phase.total(place) - around.get(place, 0) for place in Place} for phase in plan.phases
    }


def compare_with_plan(run: RunConfig, stage: str, *, world: World, timer: Stopwatch) -> dict[str, float]:
    """Show the highest memory of each phase beside its plan, of this rank; returns both as metrics.

    On a CPU the measured peaks include what the allocator has kept from earlier phases.
    """
    planned = read_json(Path(run.output_dir) / _NUMBERS).get(stage, {})
    peaks = (peak.metrics(phase) for phase, peak in timer.highest.items())
    measured = {name: count for metrics in peaks for name, count in metrics.items()}
    rows, expected = [], {}
    for phase, places in planned.items():
        for place in ("device", "host"):
            found = measured.get(f"memory/{phase}_{place}_bytes")
            if not found or not places[place]:
                continue
            expected[f"memory/{phase}_{place}_plan_bytes"] = float(places[place])
            rows.append([phase, place, places[place] / 1e9, found / 1e9, f"{100 * (places[place] / found - 1):+.0f} %"])
    if rows and world.is_main:
        columns = ["phase", "place", "planned", "measured", "difference"]
        log.info("%s", table(f"Memory of {stage}: highest GB of this rank", columns, rows=rows))
    return measured | expected


def runtime_items(device: torch.device, dtype: torch.dtype) -> tuple[Item, ...]:
    """What this process takes before it has a model; on CUDA also the context of the device.

    On a CPU libraries compile kernels when they are needed, and keep them.
    """
    host = Item("process", RUNTIME, Place.host, resident().get("RssAnon", 0))
    if device.type == "cuda":
        return (host, Item("process", RUNTIME, Place.device, _CUDA_CONTEXT))
    return (host, Item("process", KERNELS, Place.host, compiled_kernels(dtype)))


def _here(run: RunConfig, ranks: int, *, stages: list[str]) -> tuple[Machine, Limits]:
    machine = machine_of(run, ranks=ranks)
    starts_others = ranks > 1 and not under_torchrun()
    limits = limits_of(run, machine.device, computes=not starts_others)
    dtype = working_dtype(run.engine.precision, machine.device)
    for stage in stages[:1]:
        plan_stage(run, stage, machine=machine)  # what the process takes contains what a plan imports and keeps
    return replace(machine, runtime=runtime_items(machine.device, dtype)), limits


def _rows(plan: Plan, place: Place) -> Iterator[list[object]]:
    found: dict[tuple[str, str], list[int]] = {}
    for number, phase in enumerate(plan.phases):
        for item in phase.items:
            if item.place is place and item.bytes:
                found.setdefault((item.role, item.part), [0] * len(plan.phases))[number] += item.bytes
    for names, counts in found.items():
        yield [*names, *(count / 1e9 if count else None for count in counts)]
    yield ["all", "", *(phase.total(place) / 1e9 for phase in plan.phases)]


def _largest_parts(phase: Phase) -> str:
    """The largest parts in memory, without what is the same in every phase."""
    items = [item for item in phase.items if item.place is not Place.disk and item.part != RUNTIME]
    items.sort(key=lambda item: item.bytes, reverse=True)
    return ", ".join(f"{item.role}'s {item.part} {item.bytes / 1e9:.2g}" for item in items[:3])


def _name(place: Place, limits: Limits) -> str:
    return "memory" if place is Place.host and limits.device is None else str(place)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
