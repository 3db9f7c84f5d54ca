"""The memory plan beside what a process takes, on the device and on the host, wherever weights and states rest."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import plan as cases
from benchmarks.gpu_bench import Bench, failures
from benchmarks.zero_report import table
from rlhf.memory_plan.plan import Phase, Place
from rlhf.memory_plan.planner import ALLOCATOR, machine_of, plan_stage
from stages.setup.compose import save_run

_SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}
_LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
_LARGE |= {"vocab_size": 32000}
_SUPERVISED = "{0}.max_prompt_tokens={1} {0}.max_response_tokens={1} {0}.micro_batch_size=4 {0}.global_batch_size=8"
_PPO = (
    "ppo.max_prompt_tokens={1} ppo.max_response_tokens={1} ppo.micro_batch_size=4 ppo.minibatch_size=8 "
    "ppo.rollout_size=16 ppo.rollout_micro_batch_size=16"
)
CASES = {  # name: stage, and settings of the engine
    "sft, zero0": ("sft", "engine=zero0"),
    "sft, zero2_cpu": ("sft", "engine=zero2_cpu"),
    "sft, zero3_cpu": ("sft", "engine=zero3_cpu"),
    "sft, zero3_nvme": ("sft", "engine=zero3_nvme"),
    "ppo, zero0": ("ppo", "engine=zero0"),
}


def plan(bench: Bench) -> str:
    """Planned and measured bytes of each phase of a stage in bf16, batches as large as the plan assumes."""
    shape, length = (_SMALL, 16) if bench.toy else (_LARGE, 512)
    with TemporaryDirectory(dir=bench.folder) as models:
        bench.call(cases.write_model, folder=models, shape=shape, device=bench.device)
        chosen = list(CASES)[-3 if bench.toy else 0 :]
        jobs = {name: partial(_rows, bench, name, models=models, length=length) for name in chosen}
        tried = bench.together(jobs)
    rows = [row for one in tried.values() for row in (one.value or {"rows": []})["rows"]]
    processes = " ".join(one.value["process"] for one in [*tried.values()][:1] if one.value)
    rows += [[name, one.reason, *["–"] * 6] for name, one in tried.items() if one.value is None]
    head = ["", "phase", "device: tensors planned MB", "measured", "with the allocator's allowance", "reserved"]
    head += ["host: planned MB", "measured"]
    what = (
        f"{shape}; prompts and responses of {length} tokens each. The device's numbers are without its context, the "
        "host's without what the process holds before it has a model; what is reserved does not fall from phase to "
        f"phase. {processes}"
    )
    return f"{what}\n\n{table(head, rows)}{failures(tried)}"


def planned(folder: str, overrides: str, device: str) -> dict[str, dict[str, int]]:
    """Bytes of each phase by place, and the device's without the allocator's allowance; writes the configuration."""
    run = cases.compose_run(Path(folder), overrides, device=device)
    save_run(run)
    found = plan_stage(run, run.stages[0], machine=machine_of(run, ranks=1))
    return {phase.name: {"tensors": _tensors(phase)} | {p: phase.total(p) for p in Place} for phase in found.phases}


def _tensors(phase: Phase) -> int:
    return sum(item.bytes for item in phase.items if item.place is Place.device and item.part != ALLOCATOR)


def _rows(bench: Bench, name: str, *, models: str, length: int) -> dict[str, Any]:
    """The rows of a case, and what its process held before it had a model."""
    stage, engine = CASES[name]
    sizes = (_PPO if stage == "ppo" else _SUPERVISED).format(stage, length)
    folder = Path(models) / name.replace(", ", "_")
    folder.mkdir()
    for made in ("model", "reward"):
        (folder / made).symlink_to(Path(models) / made)
    overrides = f"stage={stage} {engine} engine.precision=bf16 {sizes}"
    plan = bench.call(planned, folder=str(folder), overrides=overrides, device=bench.device)
    out = folder / "measured.json"
    bench.call(cases.measure, config=str(folder / "run/config.yaml"), out=str(out))
    found = json.loads(out.read_text())
    process = f"That was {_mb(found['runtime'])} MB, and {_mb(found['bare'])} before the device had a context."
    rows = [[name, *_row(phase, plan[phase], peak=peak | found)] for phase, peak in found["peaks"].items()]
    return {"rows": rows, "process": process}


def _row(phase: str, plan: dict[str, int], *, peak: dict[str, int]) -> list[str]:
    host = peak["host"] - peak["runtime"]
    device = [
        _mb(plan["tensors"]),
        _beside(plan["tensors"], peak["device"]),
        _mb(plan["device"]),
        _mb(peak["reserved"]),
    ]
    return [phase, *device, _mb(plan["host"]), _beside(plan["host"], host)]


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f}"


def _beside(plan: int, found: int) -> str:
    """What was measured, and how far the plan is from it."""
    return f"{_mb(found)} ({plan / found - 1:+.0%})" if found > 0 else _mb(found)
