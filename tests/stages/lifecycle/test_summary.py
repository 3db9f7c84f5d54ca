"""What a run says to its reader at its start and its end is true of that run, and short."""

import shlex

import pytest

from stages.lifecycle.summary import next_steps, show_start
from stages.setup.command_line import check_overrides


def finished(folder, *words, made=("sft/model", "ppo/actor")):
    for name in made:
        (folder / name).mkdir(parents=True)
    return check_overrides([*words, f"output_dir={folder}"])


def test_a_trial_is_told_the_real_recipe_and_how_to_use_data_of_its_own(tmp_path):
    steps = next_steps(finished(tmp_path, "experiment=smoke"))
    assert len(steps) == 4
    assert steps[0] == f"  open {tmp_path}/report.html in a browser"
    assert steps[1] == f"  python run_pipeline.py stage=chat chat.model={tmp_path}/ppo/actor   talks to it"
    assert steps[2].startswith("  python run_pipeline.py   the real recipe")
    assert "experiment=custom model.path=MODEL" in steps[3]


def test_a_real_run_is_told_to_look_talk_and_publish(tmp_path):
    folder = tmp_path / "a run"
    steps = next_steps(finished(folder))
    assert len(steps) == 3
    for step, words in zip(
        steps[1:],
        (
            ["python", "run_pipeline.py", "stage=chat", f"chat.model={folder}/ppo/actor"],
            ["python", "-m", "stages.publish", f"{folder}/ppo/actor"],
        ),
        strict=True,
    ):
        assert shlex.split(step)[: len(words)] == words  # a folder with a space is quoted


@pytest.mark.parametrize(
    ("words", "made", "policy"),
    [
        (["stage=sft"], ["sft/model"], "sft/model"),
        (["stage=[sft,dpo]"], ["sft/model", "dpo/model"], "dpo/model"),
        (["stage=[sft,reward,grpo]"], ["sft/model", "grpo/actor"], "grpo/actor"),
    ],
)
def test_the_policy_that_is_named_is_the_one_that_was_made(tmp_path, words, made, policy):
    steps = next_steps(finished(tmp_path, *words, made=made))
    assert f"chat.model={tmp_path}/{policy} " in steps[1]
    assert f"stages.publish {tmp_path}/{policy} " in steps[2]


def test_what_is_not_there_is_not_named(tmp_path):
    run = finished(tmp_path, "stage=reward", "tracking.report=false", made=["reward/model"])
    assert next_steps(run) == []


def test_only_a_trial_says_that_its_numbers_mean_nothing(tmp_path, caplog):
    caplog.set_level("INFO")
    for words in ([], ["model=path", "model.path=M"], ["experiment=smoke", "model=path", "model.path=M"]):
        show_start(check_overrides(words))
    assert caplog.records == []
    show_start(check_overrides(["experiment=smoke", "stage=sft"]))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "its texts and scores mean nothing" in said
