"""The plan beside the memory of a real process: the quick version of `python -m benchmarks.plan`."""

import pytest

from benchmarks.plan import _measured, _supervised, compose_run, write_model
from rlhf.memory_plan.plan import Place
from rlhf.memory_plan.planner import ALLOCATOR, machine_of, plan_stage

SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8}


def test_tensors_take_what_was_planned_within_a_tenth(tmp_path):
    write_model(tmp_path, SHAPE)
    run = compose_run(tmp_path, _supervised("sft", 4, precision="fp32", length=32))
    plan = plan_stage(run, "sft", machine=machine_of(run, ranks=1))
    found = _measured(run, tmp_path, ranks=1, environment={"MALLOC_MMAP_THRESHOLD_": "65536"})
    for phase in plan.phases[:2]:
        planned = phase.total(Place.host) - sum(item.bytes for item in phase.items if item.part == ALLOCATOR)
        assert planned == pytest.approx(found["peaks"][phase.name]["host"] - found["runtime"], rel=0.1), phase.name
