"""A run that is killed, whenever and wherever, ends as the run that was left alone: the same bits, the same numbers."""

import dataclasses
import filecmp
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.config.dpo_config import DPOConfig
from rlhf.config.engine_config import EngineConfig
from rlhf.config.ppo_config import PPOConfig
from rlhf.config.run_config import CheckpointConfig
from rlhf.config.stage_configs import RewardConfig, SFTConfig
from rlhf.engine.checkpoint.checkpoints import Checkpoints
from rlhf.runtime import dist
from rlhf.tracking.timing import Stopwatch
from stages import pipeline
from stages.lifecycle.checkpointing import CHECKPOINTS, CheckpointManager, GracefulStop, TrainingProgress, check_resume
from stages.lifecycle.session import Session
from stages.lifecycle.stage_settings import _FREE_IN_ENGINES
from tests.config.test_configuration import composed
from tests.forking import run_forked
from tests.stages import killing

CONFIGS = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig}
METRICS = {stage: config.best_metric for stage, config in CONFIGS.items()}
SEED = int(os.environ.get("KILL_SEED", "1"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of `killing.py`'s runs, and what it says of them."""
    root = tmp_path_factory.mktemp("runs")
    done = run_forked("tests/stages/killing.py", root, SEED, env=os.environ | {"WANDB_MODE": "disabled"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return root, json.loads((root / "found.json").read_text())


def logged(file):
    """The rows of a journal without times, speeds and memory."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time", "timing", "perf", "memory"))} for row in rows]


PAIRS = [("whole", "killed"), ("whole2", "killed2")]


@pytest.mark.parametrize(("whole", "killed"), PAIRS)
def test_the_models_are_the_same_bit_for_bit(runs, whole, killed):
    root, found = runs
    assert found[whole] == 0
    assert found[killed][-1]["status"] == 0
    models = sorted(path.relative_to(root / whole) for path in (root / whole).rglob("*.safetensors"))
    assert len([model for model in models if "best" not in model.parts]) == {"whole": 7, "whole2": 2}[whole]
    for model in models:
        assert filecmp.cmp(root / whole / model, root / killed / model, shallow=False), model


def _results(record):
    """A record without the checksums: files beside the weights name the folder of their run."""
    content = json.loads(record.read_text())
    return {name: value for name, value in content.items() if name not in {"files", "sha256"}}


@pytest.mark.parametrize(("whole", "killed"), PAIRS)
def test_metrics_samples_and_records_are_the_same(runs, whole, killed):
    root, _ = runs
    journals = sorted(path.relative_to(root / whole) for path in (root / whole).glob("*/*.jsonl"))
    assert len(journals) == {"whole": 5, "whole2": 2}[whole]
    for journal in journals:
        assert logged(root / killed / journal) == logged(root / whole / journal), journal
    for record in (root / whole).glob("*/stage.json"):
        other = root / killed / record.relative_to(root / whole)
        assert _results(record) == _results(other)


def test_the_runs_were_really_killed_in_the_middle_of_things(runs):
    _, found = runs
    statuses = [life["status"] for life in found["killed"] + found["killed2"]]
    assert statuses.count(-signal.SIGKILL) >= 5
    left = [name for life in found["killed"] + found["killed2"] for name in life["left"]]
    assert any(name.endswith(".partial") for name in left)
    assert any(not name.endswith((".partial", ".removed")) for name in left)


def test_a_signal_to_one_rank_stops_all_after_the_step_with_a_checkpoint(runs):
    _, found = runs
    for history in (found["killed"], found["killed2"]):
        (polite,) = [life for life in history if life["death"] and life["death"][2] == signal.SIGTERM]
        assert polite["status"] == killing.STOPPED
        assert polite["left"]


def test_a_finished_stage_keeps_no_checkpoint_but_the_models_of_a_better_one(runs):
    root, _ = runs
    found = []
    for name in ("whole", "killed", "whole2", "killed2"):
        for stage in [path.name for path in (root / name).glob("*") if path.name in METRICS]:
            folder, metric = root / name / stage, METRICS[stage]
            rows = [row for row in logged(folder / "metrics.jsonl") if metric.metric in row and row["step"] > 0]
            best = max(rows, key=lambda row: metric.sign * row[metric.metric])  # the first of equals
            assert not list(folder.glob("checkpoints"))
            models = [path.parent.name for path in folder.glob("*/config.json")]
            expected = [] if best is rows[-1] else models
            assert sorted(path.parent.name for path in folder.glob("best/*/config.json")) == sorted(expected)
            for model in expected:
                record = json.loads((folder / "best" / model / "stage.json").read_text())
                assert record["after"] == {key: best[key] for key in record["after"]}
                found.append((stage, model))
    assert ("sft", "model") in found


def test_the_best_models_are_those_of_a_run_that_ends_there(runs):
    root, found = runs
    assert found["until_best"] == 0
    expected, best = root / "until_best/sft/model", root / "whole/sft/best/model"
    assert filecmp.cmp(expected / "model.safetensors", best / "model.safetensors", shallow=False)
    assert AutoModelForCausalLM.from_pretrained(best).config == AutoModelForCausalLM.from_pretrained(expected).config


def test_rows_that_have_changed_are_noticed_before_anything_is_loaded(tmp_path):
    there = Checkpoints(tmp_path / CHECKPOINTS, dist.World.alone(), keep=1, asynchronous=False)
    there.save(4, [], state={"data": "these"}, protected=set())
    check_resume(tmp_path, data="these")
    with pytest.raises(ValueError, match=r"step-000004 was made from other rows .* remove .*checkpoints to start anew"):
        check_resume(tmp_path, data="others")
    check_resume(tmp_path / "nothing", data="others")


def test_a_rank_that_fails_ends_the_run_with_how_to_go_on(monkeypatch, tmp_path):
    run = composed("experiment=smoke", "stage=sft", f"output_dir={tmp_path}")
    monkeypatch.setattr(pipeline.launch, "run_ranks", lambda *args, launch: "rank 1 was killed (SIGKILL)")
    there = tmp_path / "sft" / CHECKPOINTS
    Checkpoints(there, dist.World.alone(), keep=1, asynchronous=False).save(4, [], state={}, protected=set())
    with pytest.raises(SystemExit) as end:
        pipeline.run_on_ranks(run, ["sft"], world=dist.World.alone(), ranks=2, script=tmp_path)
    assert "rank 1 was killed (SIGKILL); sft is saved in" in end.value.code
    assert f"{there}/step-000004; the same command goes on from there" in end.value.code


def first_numbers(monkeypatch, *, seed, rank=0):
    """What a stage that starts anew draws first."""
    monkeypatch.setattr(
        CheckpointManager,
        "of",
        lambda *args, **options: SimpleNamespace(resume=lambda: False, progress=TrainingProgress()),
    )
    tracker = SimpleNamespace(total_steps=0, rewind=lambda step: None, log=lambda *args: None)
    config = SimpleNamespace(seed=seed, best_metric=METRICS["sft"])
    run = SimpleNamespace(training_config=lambda stage: config, checkpoint=None)
    world = dataclasses.replace(dist.World.alone(), rank=rank)
    session = Session(run, "sft", world, None, None, tracker, Stopwatch(world.device), GracefulStop(prints=False))
    session.begin(None, evaluate=lambda: {"eval/loss": torch.rand(()).item()})
    return session.progress.before["eval/loss"]


def test_random_numbers_follow_from_seed_and_rank_not_from_what_the_process_did_before(monkeypatch):
    first = first_numbers(monkeypatch, seed=3)
    torch.rand(7)  # as an earlier stage has, unless it was finished by another process
    assert first_numbers(monkeypatch, seed=3) == first
    others = [first_numbers(monkeypatch, seed=3, rank=1), first_numbers(monkeypatch, seed=4)]
    assert len({first, *others}) == 3


@pytest.mark.parametrize(("stage", "values", "best"), [("sft", [3, 2, 2, 4], 2), ("reward", [0.5, 0.7, 0.6, 0.7], 2)])
def test_the_first_of_the_best_evaluations_is_kept(stage, values, best):
    progress = TrainingProgress()
    metric = METRICS[stage]
    for step, value in enumerate(values, start=1):
        progress.note(step, {metric.metric: value}, metric=metric)
        progress.note(step, {}, metric=metric)  # no evaluation
    assert progress.best_step == best
    assert progress.after == {metric.metric: values[-1]}
    assert not progress.note(9, {metric.metric: float("nan")}, metric=metric)
    assert progress.best_step == best


def test_shares_and_steps_between_checkpoints():
    assert CheckpointConfig(every=0.2).interval_of(60) == 12
    assert CheckpointConfig(every=0.2).interval_of(8) == 2
    assert CheckpointConfig(every=5).interval_of(60) == 5
    assert CheckpointConfig(every=0).interval_of(60) == 0
    assert CheckpointConfig(every=0.07).interval_of(100) == 7  # the product of the floats is 7.000000000000001
    assert CheckpointConfig(every=1e-9).interval_of(60) == 1


def test_only_settings_that_change_results_bind_a_checkpoint():
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    assert names - set(_FREE_IN_ENGINES) == {
        *("precision", "fast_fp32_matmul", "moments", "grad_accum_dtype", "reduce_dtype", "deepspeed", "loss_scale"),
        *("initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis", "min_loss_scale"),
    }
    assert set(_FREE_IN_ENGINES) <= names
