"""One stage's record: what is written, by whom, and what a resumed run makes of it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf.config.run_config import ProgressDisplay, TrackingConfig, WandbMode
from rlhf.runtime.dist import World
from rlhf.tracking.jsonl_log import JsonlLog
from rlhf.tracking.tracker import Tracker, requested_mode

ROOT = Path(__file__).parents[2]


def tracker(folder, *, rank=0, log_every=1, total_steps=10, progress=ProgressDisplay.quiet):
    return Tracker(
        folder,
        stage="ppo",
        config=TrackingConfig(wandb=WandbMode.disabled, progress=progress, log_every=log_every),
        run_name="exp",
        run_config={"seed": 1},
        total_steps=total_steps,
        world=World(rank=rank, size=2, device=torch.device("cpu")),
    )


def metrics(folder):
    return JsonlLog(folder / "metrics.jsonl").rows()


def test_a_step_is_a_row_with_its_time_and_exact_numbers(tmp_path):
    with tracker(tmp_path / "ppo") as track:
        track.log(1, {"objective/kl": 1 / 3, "gold/vader": torch.tensor(0.5)})
        track.log(2, {"objective/kl": math.nan})
    first, second = metrics(tmp_path / "ppo")
    assert first["step"] == 1
    assert first["objective/kl"] == 1 / 3
    assert first["gold/vader"] == 0.5
    assert second["objective/kl"] is None
    assert 1.7e9 < first["time"] <= second["time"]


def test_log_every_thins_the_rows_but_keeps_evaluations_and_the_last_step(tmp_path):
    with tracker(tmp_path, log_every=3, total_steps=10) as track:
        for step in range(11):
            track.log(step, {"actor/loss": float(step)})
            if step == 4:
                track.log(step, {"eval/score": 1.0})
                track.log(step, {"gold/vader": 1.0})
    assert [row["step"] for row in metrics(tmp_path)] == [0, 3, 4, 4, 6, 9, 10]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_refuses_an_unknown_metric(tmp_path, rank):
    track = tracker(tmp_path, rank=rank)
    with pytest.raises(ValueError, match="'actor/looss' is not registered"):
        track.log(1, {"objective/kl": 1.0, "actor/looss": 2.0})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_rank_above_zero_writes_and_shows_nothing(tmp_path, capfd, caplog):
    with tracker(tmp_path / "ppo", rank=1, progress=ProgressDisplay.bar) as track:
        track.log(1, {"objective/kl": 1.0})
        track.samples(1, [{"prompt": "p", "response": "r"}])
        track.summary({"eval/score": 1.0})
        track.rewind(0)
    assert list(tmp_path.iterdir()) == []
    out, err = capfd.readouterr()
    assert (out, err, caplog.records) == ("", "", [])


def test_a_resumed_stage_appends_after_the_step_it_resumes_from(tmp_path):
    with tracker(tmp_path) as track:
        for step in range(1, 5):
            track.log(step, {"objective/kl": 1.0})
            track.samples(step, [{"response": f"first {step}"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "obj')  # killed here
    with tracker(tmp_path) as track:
        track.rewind(2)
        track.log(3, {"objective/kl": 2.0})
        track.samples(3, [{"response": "second 3"}])
    assert [(row["step"], row["objective/kl"]) for row in metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    said = [row["response"] for row in JsonlLog(tmp_path / "samples.jsonl").rows()]
    assert said == ["first 1", "first 2", "second 3"]


def test_a_resumed_stage_is_not_glued_to_a_broken_line_even_without_a_rewind(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "objective/kl": 1.0}\n{"step": 2, "obj')
    with tracker(tmp_path) as track:
        track.log(2, {"objective/kl": 2.0})
    assert [row["objective/kl"] for row in metrics(tmp_path)] == [1.0, 2.0]


def test_samples_keep_their_columns(tmp_path):
    track = tracker(tmp_path)
    track.samples(1, [])
    track.samples(1, [{"prompt": "p", "score": math.inf}, {"prompt": "q", "score": 1.0}])
    with pytest.raises(AssertionError, match="columns"):
        track.samples(2, [{"prompt": "p", "length": 3}])
    assert JsonlLog(tmp_path / "samples.jsonl").rows() == [
        {"step": 1, "prompt": "p", "score": None},
        {"step": 1, "prompt": "q", "score": 1.0},
    ]


def test_the_summary_keeps_what_it_is_not_told_again(tmp_path):
    with tracker(tmp_path) as track:
        track.summary({"before": 1.0, "peak": math.nan})
        track.summary({"after": "ü", "before": 2.0})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"before": 2.0, "peak": None, "after": "ü"}


@pytest.mark.parametrize(
    ("configured", "environment", "mode"),
    [
        ("auto", None, "auto"),
        ("auto", "", "auto"),
        ("auto", "disabled", "disabled"),
        ("auto", "Offline", "offline"),
        ("auto", "dryrun", "offline"),
        ("auto", "online", "online"),
        ("offline", "online", "offline"),
        ("online", "disabled", "online"),
        ("disabled", "online", "disabled"),
    ],
)
def test_the_configuration_wins_over_wandb_mode_which_wins_over_auto(monkeypatch, configured, environment, mode):
    if environment is None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
    else:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert requested_mode(WandbMode(configured)) is WandbMode(mode)


def test_a_mode_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(ValueError, match="WANDB_MODE=offlin: expected one of auto, online, offline, disabled"):
        requested_mode(WandbMode.auto)


def test_a_run_without_wandb_does_not_need_it(tmp_path):
    script = """
import sys
from pathlib import Path
sys.modules["wandb"] = None  # importing it would fail
from tests.tracking.test_tracker import tracker
with tracker(Path(sys.argv[1])) as track:
    track.log(1, {"objective/kl": 1.0})
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True, timeout=600)
    assert [row["step"] for row in metrics(tmp_path)] == [1]


def test_rows_that_are_gone_before_a_resume_are_said(tmp_path, caplog):
    with tracker(tmp_path) as track:
        for step in range(1, 4):
            track.log(step, {"objective/kl": 1.0})
        track.samples(3, [{"response": "a"}, {"response": "b"}])
        saved = track.state_dict()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(lines[0] + lines[2])
    (tmp_path / "samples.jsonl").unlink()
    with tracker(tmp_path) as track:
        track.load_state_dict(json.loads(json.dumps(saved)))
        track.rewind(3)
    assert "metrics.jsonl holds 2 of the 3 rows that were written up to step 3" in caplog.text
    assert "samples.jsonl holds 0 of the 2 rows" in caplog.text


def test_rows_that_are_all_there_are_not_talked_about(tmp_path, caplog):
    with tracker(tmp_path, log_every=2) as track:
        for step in range(1, 5):
            track.log(step, {"objective/kl": 1.0})
        saved = track.state_dict()
        track.log(6, {"objective/kl": 1.0})
    with tracker(tmp_path) as track:
        track.load_state_dict(saved)
        track.rewind(4)
    assert caplog.text == ""


def test_a_damaged_summary_is_named_before_training(tmp_path):
    (tmp_path / "summary.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match="summary.json is damaged"):
        tracker(tmp_path)
