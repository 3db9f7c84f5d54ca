"""The memory plan for people: printed, written to `plan.txt`, and the reason to refuse a run.

Left out: how it is computed (`planner.py`), and what was measured (`measured.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from rlhf.config.run_config import RunConfig
from rlhf.memory_plan.advice import cheapest_change
from rlhf.memory_plan.limits import full_disks, machine_limits
from rlhf.memory_plan.measured import NUMBERS
from rlhf.memory_plan.plan import Item, Limits, Phase, Place, Plan, chosen_limits
from rlhf.memory_plan.planner import Machine, machine_of, plan_stage
from rlhf.runtime.atomic_files import write_text
from rlhf.runtime.dist import World, barrier
from rlhf.runtime.launch import under_torchrun
from rlhf.tracking.peak_memory import resident
from rlhf.tracking.text_table import table

log = logging.getLogger(__name__)

PLAN = "plan.txt"
RUNTIME = "runtime"
_CUDA_CONTEXT = 600_000_000  # bytes of a process on an H100 before its first tensor: context, kernels, cuBLAS


def check_memory(run: RunConfig, stages: list[str], *, ranks: int) -> None:
    """Print the plan of the stages, write it to the output folder, and refuse what cannot fit.

    Raises:
        ValueError: a stage does not fit, and `memory.enforce` is true; what would make it fit.
    """
    machine, limits = _here(run, ranks)
    plans = [plan_stage(run, stage, machine=machine) for stage in stages]
    log.info("%s", short_text(plans, limits))
    texts = [full_text(plan, limits) for plan in plans]
    verdicts = [verdict(run, plan, machine=machine, limits=limits) for plan in plans]
    folder = Path(run.output_dir)
    write_text(folder / PLAN, "\n\n".join(f"{text}\n{said}" for text, said in zip(texts, verdicts, strict=True)) + "\n")
    write_text(folder / NUMBERS, json.dumps({plan.stage: numbers(plan) for plan in plans}, indent=2) + "\n")
    refused = [said for plan, said in zip(plans, verdicts, strict=True) if plan.shortages(limits)]
    refused += [said for plan in plans for said in full_disks(run, plan)]
    if refused and run.memory.enforce:
        raise ValueError("\n".join([*refused, "memory.enforce=false starts it all the same."]))
    for said in refused:
        log.warning("%s", said)


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
    machine, limits = _here(run, ranks)
    plans = [plan_stage(run, stage, machine=machine) for stage in run.stages]
    texts = [f"{full_text(plan, limits)}\n{verdict(run, plan, machine=machine, limits=limits)}" for plan in plans]
    return "\n\n".join(texts + [f"{use}: has no plan; its models are frozen" for use in run.uses])


def full_text(plan: Plan, limits: Limits) -> str:
    """Every part of every role in every phase, a table for each place."""
    where = "CUDA" if plan.is_cuda else "CPU"
    lines = [f"{plan.stage}: {plan.ranks} rank{'s' * (plan.ranks > 1)} of this machine on {where}; GB of each rank"]
    names = {Place.device: "device", Place.host: "host" if plan.is_cuda else "memory", Place.disk: "disk"}
    for place, name in names.items():
        rows = list(_rows(plan, place))
        if len(rows) > 1:
            columns = ["role", "part", *(phase.name for phase in plan.phases)]
            lines += ["", table(f"{name}, {_limit_text(place, limits)}", columns, rows=rows)]
    return "\n".join(lines)


def verdict(run: RunConfig, plan: Plan, *, machine: Machine, limits: Limits) -> str:
    """One or two sentences: whether it fits, and what would make it fit."""
    largest = plan.largest
    place = Place.device if plan.is_cuda else Place.host
    has = f"{plan.stage}: the largest phase is {largest.name} with {_gb(plan.needed(largest, place))} of {place}"
    short = plan.shortages(limits)
    if not short:
        full = [] if run.memory.disk_gb is not None else full_disks(run, plan)
        return f"{has}; it does not fit on its disks. {' '.join(full)}" if full else f"{has}; it fits."
    worst = short[0]
    stage, ranks = str(run.stage_of(plan.stage)), machine.ranks
    change = cheapest_change(
        run, stage, plan=partial(plan_stage, stage=stage, machine=machine), limits=limits, ranks=ranks
    )
    lacks = (
        f"{has}; it does not fit: {worst.phase} needs {_gb(worst.needed)} of {worst.place}, "
        f"found {_gb(worst.available)}."
    )
    if change is None:
        return f"{lacks} No setting of the engine makes it fit: use shorter sequences, a smaller model, or more ranks."
    return f"{lacks} The cheapest change that makes it fit: {' '.join(change.settings)} ({change.cost})."


def runtime_items(device: torch.device) -> tuple[Item, ...]:
    """What this process takes before it has a model; on CUDA also the context of the device."""
    host = resident().get("RssAnon", 0)
    on_device = (Item("process", RUNTIME, Place.device, _CUDA_CONTEXT),) if device.type == "cuda" else ()
    return (Item("process", RUNTIME, Place.host, host), *on_device)


def _here(run: RunConfig, ranks: int) -> tuple[Machine, Limits]:
    machine = machine_of(run, ranks=ranks)
    starts_others = ranks > 1 and not under_torchrun()
    limits = chosen_limits(run.memory, machine_limits(run, machine.device, computes=not starts_others))
    return Machine(machine.device, machine.ranks, machine.local_ranks, runtime_items(machine.device)), limits


def _rows(plan: Plan, place: Place) -> Iterator[list[object]]:
    found: dict[tuple[str, str], list[int]] = {}
    for number, phase in enumerate(plan.phases):
        for item in phase.items:
            if item.place is place and item.bytes:
                found.setdefault((item.role, item.part), [0] * len(plan.phases))[number] += item.bytes
    for (role, part), counts in found.items():
        yield [role, part, *(count / 1e9 if count else None for count in counts)]
    yield ["all", "", *(phase.total(place) / 1e9 for phase in plan.phases)]


def short_text(plans: list[Plan], limits: Limits) -> str:
    """A line for each phase."""
    rows = [
        [plan.stage, phase.name, *(phase.total(place) / 1e9 for place in _places(limits)), _mostly(phase)]
        for plan in plans
        for phase in plan.phases
    ]
    names = [str(place) if limits.device is not None or place is Place.disk else "memory" for place in _places(limits)]
    runtime = {item.place: item.bytes for phase in plans[0].phases for item in phase.items if item.part == RUNTIME}
    own = " and ".join(f"{count / 1e9:.2g} GB of {place}" for place, count in runtime.items())
    title = f"Memory plan: GB of each rank, of which the process takes {own} without a model"
    return table(title, ["stage", "phase", *names, "mostly"], rows=rows)


def numbers(plan: Plan) -> dict[str, dict[str, int]]:
    """Bytes of each phase by place, as they are measured: on a device tensors alone, not the context around them."""
    measured = {place: [phase.total(place) for phase in plan.phases] for place in Place}
    measured[Place.device] = [
        sum(item.bytes for item in phase.items if item.place is Place.device and item.part != RUNTIME)
        for phase in plan.phases
    ]
    return {
        phase.name: {str(place): counts[number] for place, counts in measured.items()}
        for number, phase in enumerate(plan.phases)
    }


def _places(limits: Limits) -> list[Place]:
    return list(Place) if limits.device is not None else [Place.host, Place.disk]


def _mostly(phase: Phase) -> str:
    """The largest parts in memory that are not the same in every phase."""
    items = [item for item in phase.items if item.place is not Place.disk and item.part != RUNTIME]
    items.sort(key=lambda item: item.bytes, reverse=True)
    return ", ".join(f"{item.role}'s {item.part} {item.bytes / 1e9:.2g}" for item in items[:3])


def _limit_text(place: Place, limits: Limits) -> str:
    available = {Place.device: limits.device or 0, Place.host: limits.host, Place.disk: limits.disk}[place]
    return f"{_gb(available)} to be had" + ("" if place is Place.device else " by all ranks together")


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
