"""The smoke pipeline end to end, as a user runs it: one rank, two ranks, again, and changed."""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.runtime.dist import World
from rlhf.tracking.dashboard import PHASES
from rlhf.tracking.metric_registry import METRICS
from rlhf.tracking.metric_registry import registered as registry_name
from stages.pipeline import run_stage
from tests.config.test_configuration import composed
from tests.forking import run_forked
from tests.tracking.test_wandb import records

ROOT = Path(__file__).parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}


def pipeline(*arguments, ranks=1, cwd=ROOT):
    return run_forked("run_pipeline.py", *arguments, ranks=ranks, cwd=cwd, env={**os.environ, **ONE_THREAD})


def smoke(folder, *arguments, ranks=1):
    shared = ["engine.precision=fp32", "tracking.report=false", f"data.cache_dir={folder.parent / 'tokens'}"]
    done = pipeline("experiment=smoke", *shared, f"output_dir={folder}", *arguments, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, smoke(folder, "tracking.report=true")


def test_a_run_leaves_the_documented_tree(one_rank):
    folder, _ = one_rank
    expected = {
        *("config.yaml", "sft/model/model.safetensors", "sft/model/chat_template.jinja", "sft/stage.json"),
        *("reward/model/model.safetensors", "reward/model/stage.json", "reward/metrics.jsonl"),
        *("report.html", "sft/report.html", "reward/report.html", "ppo/report.html", "origin.jsonl"),
        *("ppo/actor/model.safetensors", "ppo/critic/model.safetensors", "ppo/samples.jsonl", "ppo/metrics.jsonl"),
    }
    assert {path for path in expected if not (folder / path).exists()} == set()


def test_a_run_says_its_arithmetic_and_its_results(one_rank):
    _, output = one_rank
    assert "sft: global_batch_size 8 = 1 ranks x 4 sequences x 2 accumulation" in output
    assert "4 steps per iteration = 2 minibatches x 2 epochs" in output
    assert "Held-out results" in output
    assert "before and after PPO" in output
    assert "A tiny model with random weights" in output.splitlines()[0]
    *_, title, report, chat, real, own = output.splitlines()
    assert title.endswith("Next:")
    assert [line.startswith("  ") for line in (report, chat, real, own)] == [True] * 4


def test_the_report_of_a_run_misses_nothing(one_rank):
    folder, output = one_rank
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "Missing from this report" not in html
    assert f"output_dir={folder}" in html  # the command
    assert f"{folder / 'report.html'} shows it" in output


def test_plain_transformers_load_every_model(one_rank):
    folder, _ = one_rank
    tokenizer = AutoTokenizer.from_pretrained(folder / "ppo/actor")
    batch = tokenizer(["Movie review: This", "Movie"], return_tensors="pt", padding=True)
    for path in ("sft/model", "ppo/actor"):
        assert AutoModelForCausalLM.from_pretrained(folder / path)(**batch).logits.isfinite().all()
    for path in ("reward/model", "ppo/critic"):
        model = AutoModelForSequenceClassification.from_pretrained(folder / path)
        assert model(**batch).logits.shape == (2, 1)


def test_every_iteration_is_logged_whole(one_rank):
    folder, _ = one_rank
    logged = rows(folder / "ppo/metrics.jsonl")
    assert [row["step"] for row in logged] == [0, 1, 2]
    for row in logged[1:]:
        assert all(math.isfinite(value) for value in row.values())
        assert {"objective/kl", "actor/clipfrac_avg", "critic/explained_variance", "rollout/eos_rate"} <= set(row)
        assert row["rollout/logprob_gap_max"] < 1e-4  # the generation path and the training path agree


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_logs_what_the_registry_says_and_nothing_else(one_rank, stage):
    folder, _ = one_rank
    logged = {name for row in rows(folder / stage / "metrics.jsonl") for name in row} - {"step", "time"}
    elsewhere = {"memory/device_bytes", "actor/kl_clamped", "ema/*"}  # on a GPU, in grpo, with ema_decay
    elsewhere |= {name for name in METRICS if name.endswith("/lora_lr")}  # with optimizer.lora_lr
    elsewhere |= {"ptx/loss", "ptx/tokens", "objective/reference_updated"}  # with ppo.ptx.coef
    elsewhere |= {"rollout/groups_equal", "rollout/further_rollouts"}  # with dynamic_sampling
    elsewhere |= {"rollout/mismatch_weight", "rollout/mismatch_left_out"}  # with mismatch.correction; the rest in fp16
    elsewhere |= {name for name in METRICS if name.endswith(("/loss_scale", "/scale_search_steps"))}
    elsewhere |= {"objective/raw_scores", "eval/raw_score", "reward/log/*"}  # with several sources, with functions
    elsewhere |= {"eval/reward/log/*", "perf/fastest_rank_s/*", "perf/slowest_rank_s/*"}  # with several ranks
    registered = {name for name, entry in METRICS.items() if stage in entry.stages} - elsewhere
    assert {registry_name(name) for name in logged} == registered


def test_the_time_of_an_iteration_is_known_by_phase_and_part(one_rank):
    folder, _ = one_rank
    for row in rows(folder / "ppo/metrics.jsonl")[1:]:
        actor, critic = row["timing_s/train/actor"], row["timing_s/train/critic"]
        assert 0 < actor + critic <= row["timing_s/train"]
        assert 0 < row["timing_s/score/reward"] <= row["timing_s/score"]
        assert sum(row.get(f"timing_s/{phase}", 0.0) for phase in PHASES) <= row["timing_s/step"]
        assert row["rollout/trained_tokens"] == 2 * row["rollout/scored_tokens"]  # two epochs
        assert row["rollout/generated_tokens"] == 16 * row["rollout/response_length"]
        for phase, tokens in (("generate", "generated"), ("score", "scored"), ("train", "trained")):
            speed = row[f"rollout/{tokens}_tokens"] / row[f"timing_s/{phase}"]
            assert row[f"perf/tokens_per_second/{phase}"] == pytest.approx(speed)


def test_before_training_the_policy_is_the_reference(one_rank):
    folder, _ = one_rank
    first = rows(folder / "ppo/metrics.jsonl")
    assert first[0]["eval/kl"] == pytest.approx(0, abs=1e-5)
    assert first[1]["objective/kl"] == pytest.approx(0, abs=1e-5)


def test_a_reward_model_that_judges_nothing_is_said_at_its_end_and_before_ppo_starts(one_rank):
    folder, output = one_rank
    said = "The reward model's scores of held-out responses deviate by 0.0"  # four steps teach it nothing
    reward, before, ppo = (output.index(text) for text in (f"reward: {said}", f"ppo: {said}", "ppo 2/2"))
    assert reward < before < ppo
    first = rows(folder / "ppo/metrics.jsonl")[0]
    after = json.loads((folder / "reward/stage.json").read_text())["after"]
    for name in ("accuracy", "pairs", "score_std"):
        assert first[f"reward_model/{name}"] == after[f"eval/{name}"]
    for report in ("report.html", "reward/report.html", "ppo/report.html"):
        assert said.replace("'", "&#39;") in (folder / report).read_text(encoding="utf-8"), report


BY_TOKENS = [
    f"{stage}.{setting}"
    for stage, tokens in (("sft", 100), ("reward", 200), ("ppo", 60))
    for setting in ("micro_batch_size=8", f"micro_batch_tokens={tokens}")
]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([], "2 ranks x 4 sequences x 1 accumulation"),
        (BY_TOKENS, "global_batch_size 8 on 2 ranks in micro-batches of at most 100 tokens and 8 sequences"),
    ],
)
def test_two_ranks_with_zero_3_give_the_numbers_of_one_rank(one_rank, tmp_path, sizes, said):
    alone = one_rank[0]
    output = smoke(tmp_path, "engine=zero3", *sizes, ranks=2)
    assert said in output
    for stage in ("sft", "reward", "ppo"):
        for one, two in zip(
            rows(alone / stage / "metrics.jsonl"), rows(tmp_path / stage / "metrics.jsonl"), strict=True
        ):
            assert two["perf/fastest_rank_s/step"] <= two["perf/slowest_rank_s/step"]
            numbers = [name for name in one if not name.startswith(("time", "timing_s", "memory", "perf"))]
            assert {name: two[name] for name in numbers} == pytest.approx(
                {name: one[name] for name in numbers}, rel=2e-3, abs=2e-3
            )
    for model in ("sft/model", "reward/model"):
        first = AutoModelForCausalLM if model == "sft/model" else AutoModelForSequenceClassification
        pair = [first.from_pretrained(folder / model).state_dict() for folder in (alone, tmp_path)]
        for name, value in pair[0].items():
            torch.testing.assert_close(pair[1][name], value, rtol=1e-3, atol=1e-4)


def test_the_same_command_again_skips_what_is_finished(one_rank):
    folder, _ = one_rank
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    again = smoke(folder)
    assert [f"{stage} is finished" in again for stage in ("sft", "reward", "ppo")] == [True] * 3
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == before


def test_a_folder_of_other_settings_is_refused_with_the_difference(one_rank):
    folder, _ = one_rank
    done = pipeline("experiment=smoke", "engine.precision=fp32", f"output_dir={folder}", "sft.optimizer.lr=0.5")
    assert done.returncode == 1
    assert "sft.optimizer.lr: there 0.001, now 0.5" in done.stderr
    assert "output_dir=" in done.stderr
    assert "Traceback" not in done.stderr


def test_ppo_runs_alone_on_given_models(one_rank, tmp_path):
    folder, _ = one_rank
    models = [f"ppo.actor={folder / 'sft/model'}", f"ppo.reward={folder / 'reward/model'}"]
    smoke(tmp_path, "stage=[ppo_lora]", *models, "ppo.iterations=1", "ppo.lora.top_layers=1", "engine.precision=bf16")
    assert (tmp_path / "ppo/actor/adapter/adapter_model.safetensors").exists()
    merged = json.loads((tmp_path / "ppo/stage.json").read_text())["merged"]
    assert merged.keys() == {"actor", "critic"}
    for name, merge in merged.items():
        assert json.loads((tmp_path / "ppo" / name / "stage.json").read_text())["merged"] == {name: merge}
        stored = load_file(tmp_path / "ppo" / name / "model.safetensors")
        assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{merge['stored_in']}"}
        assert merge["kept"] > 0.99
    assert not (tmp_path / "sft").exists()


def test_a_policy_without_a_critic_learns_from_groups(one_rank, tmp_path):
    folder, _ = one_rank
    models = [f"ppo.actor={folder / 'sft/model'}", f"ppo.reward={folder / 'reward/model'}"]
    smoke(tmp_path, "stage=grpo", *models, "ppo.iterations=1", "ppo.samples_per_prompt=4")
    assert (tmp_path / "grpo/actor").exists()
    assert not (tmp_path / "grpo/critic").exists()
    last = rows(tmp_path / "grpo/metrics.jsonl")[-1]
    assert 0 <= last["rollout/groups_equal"] <= 1
    assert "timing_s/train/actor" in last
    assert "timing_s/train/critic" not in last


def test_a_missing_input_is_named_before_anything_is_loaded(tmp_path):
    done = pipeline("experiment=smoke", "stage=ppo", f"output_dir={tmp_path}")
    assert done.returncode == 1
    assert "ppo.actor=" in done.stderr
    assert "stage=[sft,reward,ppo]" in done.stderr


def test_a_folder_called_data_where_the_user_stands_hides_nothing(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/__init__.py").write_text("raise RuntimeError('the wrong data')")
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "completion": " b"}\n' * 40)
    arguments = ["experiment=smoke", "stage=sft", "data=files", "data.sft.train=[mine.jsonl]", "launch.ranks=2"]
    done = pipeline(*arguments, "sft.max_steps=1", "tracking.report=false", "output_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out/sft/stage.json").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("engine", ["zero0", "zero2_cpu", "zero3_nvme"])
def test_the_pipeline_runs_on_a_device_wherever_the_states_are(tmp_path, engine):
    arguments = [f"engine={engine}", "engine.device=cuda", f"engine.nvme_path={tmp_path / 'disk'}"]
    done = pipeline("experiment=smoke", *arguments, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(
        math.isfinite(row["train/loss"]) for row in rows(tmp_path / "run/sft/metrics.jsonl") if "train/loss" in row
    )
    assert (tmp_path / "run/ppo/stage.json").exists()


@pytest.mark.parametrize(("ranks", "sent"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_an_interruption_saves_the_run_stops_every_rank_and_says_how_to_go_on(tmp_path, ranks, sent):
    arguments = ["experiment=smoke", "stage=sft", "sft.max_steps=100000", "sft.eval_every=5", "checkpoint.best=false"]
    command = [sys.executable, str(ROOT / "run_pipeline.py"), *arguments, f"output_dir={tmp_path}"]
    log = tmp_path / "log"
    command = [*command, f"launch.ranks={ranks}", "tracking.report=false"]
    with (
        log.open("w") as output,
        subprocess.Popen(command, env={**os.environ, **ONE_THREAD}, stdout=output, stderr=output) as running,
    ):
        try:
            while "sft 5/100000" not in log.read_text():
                assert running.poll() is None, log.read_text()
                time.sleep(0.1)
            running.send_signal(sent)
            assert running.wait(timeout=600) == 1
        finally:
            running.kill()
    (saved,) = (tmp_path / "sft/checkpoints").iterdir()
    assert f"interrupted: sft is saved in {saved}; the same command goes on from there" in log.read_text()
    assert "Traceback" not in log.read_text()
    ranks = [file for file in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _bytes(file)]
    assert ranks == []


def _bytes(file):
    try:
        return file.read_bytes()
    except OSError:  # the process has ended meanwhile
        return b""


def test_a_prompt_with_a_line_separator_breaks_no_table(one_rank, tmp_path):
    folder, _ = one_rank
    rows_ = [json.dumps({"prompt": f"line\u2028separator {number}"}, ensure_ascii=False) for number in range(40)]
    (tmp_path / "odd.jsonl").write_text("\n".join(rows_))
    models = [f"ppo.actor={folder / 'sft/model'}", f"ppo.reward={folder / 'reward/model'}"]
    smoke(tmp_path / "out", "stage=ppo", *models, "data=files", f"data.ppo.train=[{tmp_path / 'odd.jsonl'}]")


def test_an_evaluation_follows_stages_that_are_finished(one_rank):
    folder, _ = one_rank
    words = ["stage=[sft,reward,ppo,eval]", "eval.prompts=5", "eval.name=later", "tracking.wandb=offline"]
    output = smoke(folder, *words)
    assert "ppo is finished" in output
    assert "Which answer is better" in output
    assert "Expected calibration error" in output
    results = json.loads((folder / "eval/later/results.json").read_text())
    assert (results["prompts"], results["judges"]["reward"]["judged"]) == (5, 5)
    assert results["reward_model"]["accuracy"]["count"] == 32
    assert len(rows(folder / "eval/later/samples.jsonl")) == 5
    (kept,) = (folder / "wandb").glob("offline-run-*")
    found = records(kept)
    sent = {key: value for part in found["summary"] for key, value in part["update"].items()}
    (score,) = [row["model"]["mean"] for row in results["measures"] if row["name"] == "normalized_score"]
    assert sent["model/normalized_score"] == pytest.approx(score)
    assert sent["win_rate/reward"] == results["judges"]["reward"]["win_rate"]["mean"]
    assert (found["run"][0]["job_type"], found["run"][0]["display_name"]) == ("eval", "smoke/eval/later")


def test_a_stage_begins_without_the_models_of_the_one_before(monkeypatch, tmp_path):
    models = weakref.WeakSet()

    def train(_run, _world):
        assert not models, "that of the stage before is still there"
        model = torch.nn.Linear(2, 2)
        model.register_forward_hook(lambda *_: model)  # as an engine's hooks hold what they belong to
        models.add(model)

    monkeypatch.setattr("stages.pipeline.stage_function", lambda _stage: train)
    monkeypatch.setattr("stages.pipeline.report_stage", lambda *_, **__: None)
    gc.disable()  # otherwise it may look by chance
    try:
        for stage in ("sft", "reward"):
            run_stage(composed("experiment=smoke", f"output_dir={tmp_path}"), stage, world=World.alone())
    finally:
        gc.enable()
    assert models
