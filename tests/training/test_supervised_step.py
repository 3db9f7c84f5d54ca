import pytest

from data.samples import READERS
from rlhf.config.run_config import SUPERVISED
from rlhf.memory_plan.workloads import PHASES
from rlhf.tracking.metric_registry import ALL
from rlhf.training.supervised_step import OBJECTIVES
from stages.pipeline import stage_function


@pytest.mark.parametrize("stage", SUPERVISED)
def test_a_stage_that_learns_from_examples_is_described_by_its_settings(stage):
    settings = SUPERVISED[stage]
    assert settings.objective in OBJECTIVES
    assert settings.rows in READERS
    assert "model" in PHASES[stage]["train"]
    assert stage in ALL
    assert stage_function(stage).__name__ == f"run_{stage}"
