"""How a run ends that cannot go on."""

import pytest

import run_pipeline
from rlhf.dist import World
from rlhf.failure import RunError
from tests.test_configuration import composed


@pytest.mark.parametrize(("raised", "ends_with"), [(RunError, SystemExit), (ValueError, ValueError)])
def test_what_fails_around_the_program_is_one_sentence_and_what_fails_in_it_is_not(
    monkeypatch, tmp_path, raised, ends_with
):
    def fails(*_):
        raise raised("the disk is full; free some")

    monkeypatch.setitem(run_pipeline.STAGES, "sft", fails)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(ends_with) as ended:
        run_pipeline.run_stages(composed("experiment=smoke", f"output_dir={tmp_path}"), ["sft"], world=World.alone())
    if raised is RunError:
        assert str(ended.value).startswith("error: the disk is full; free some (")
