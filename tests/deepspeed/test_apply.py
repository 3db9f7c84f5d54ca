"""A DeepSpeed file in a run: every stage and model, the command line beside it, and what is said about it."""

import base64
import dataclasses
import json
import logging
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from rlhf.config.engine_config import OffloadDevice, Precision
from rlhf.config.stage_configs import Schedule
from rlhf.deepspeed.apply import with_deepspeed
from stages.lifecycle.stage_settings import settings_of
from stages.setup.command_line import overridden_keys
from stages.setup.compose import CONF_DIR, load_run, register_schema, save_run, to_run
from tests.forking import run_forked

ROOT = Path(__file__).parents[2]
GENERAL = ["experiment=custom", "model.path=somewhere"]
OFFLOAD = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": True}}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes a configuration into the working directory, so that the same words on the command line compose once."""
    monkeypatch.chdir(tmp_path)

    def write(content, name="ds.json"):
        Path(name).write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
        return name

    return write


@cache
def composed(*overrides):
    register_schema()
    with initialize_config_dir(CONF_DIR, version_base=None):
        return to_run(compose("config", overrides=[*GENERAL, "output_dir=/nowhere", *overrides]))


def run_of(*overrides, ranks=1):
    return with_deepspeed(composed(*overrides), ranks=ranks, overridden=overridden_keys(list(overrides)))


def test_a_run_without_a_file_stays_as_it_is():
    assert with_deepspeed(composed(), ranks=2) == composed()


def test_one_file_reaches_every_stage_and_model(file):
    run = run_of(f"engine.deepspeed={file(OFFLOAD)}")
    engines = [run.engine, run.sft.engine, run.reward.engine, run.ppo.engine, run.ppo.critic_engine]
    engines += [run.ppo.reference_engine, run.ppo.reward_engine]
    for engine in engines:
        found = (engine.zero_stage, engine.offload_optimizer, engine.precision, engine.deepspeed)
        assert found == (3, OffloadDevice.cpu, Precision.bf16, None)


def test_one_file_reaches_what_is_done_with_the_models(file):
    content = OFFLOAD | {"train_batch_size": 32}
    run = run_of("stage=[eval,chat]", f"engine.deepspeed={file(content)}")
    for use in (run.eval, run.chat):
        assert (use.engine.zero_stage, use.engine.precision, use.engine.deepspeed) == (3, Precision.bf16, None)
    assert run.eval.micro_batch_size == composed("stage=eval").eval.micro_batch_size


def test_each_model_can_have_its_own(file):
    actor, critic = file(OFFLOAD, "actor.json"), file({"zero_optimization": {"stage": 1}}, "critic.json")
    run = run_of(
        f"ppo.engine.deepspeed={actor}", f"ppo.critic_engine.deepspeed={critic}", "ppo.reward_engine.deepspeed=null"
    )
    ppo = run.ppo
    stages = [e.zero_stage for e in (ppo.engine, ppo.critic_engine, ppo.reference_engine, ppo.reward_engine)]
    assert stages == [3, 1, 3, 0]
    assert (run.sft.engine.zero_stage, run.engine.zero_stage) == (0, 0)


def test_a_mapping_does_as_well_as_a_file():
    run = run_of("stage=sft", "engine.deepspeed={zero_optimization: {stage: 2, cpu_offload: true}}")
    assert (run.sft.engine.zero_stage, run.sft.engine.offload_optimizer) == (2, OffloadDevice.cpu)


def test_a_mapping_is_called_what_it_was_given_as_and_said_once(caplog):
    with caplog.at_level(logging.INFO, logger="rlhf.deepspeed.apply"):
        run_of("stage=[sft,ppo]", "engine.deepspeed={zero_optimization: {stage: 2}, stepss_per_print: 1}")
    assert (
        caplog.text.count("engine.zero_stage = 2  <- engine.deepspeed: zero_optimization.stage  [sft, ppo actor") == 1
    )
    assert caplog.text.count("engine.deepspeed: neither DeepSpeed nor this run reads stepss_per_print") == 1
    with pytest.raises(ValueError, match=r"^engine\.deepspeed: zero_optimization\.stage=9"):
        run_of("stage=[sft,ppo]", "engine.deepspeed={zero_optimization: {stage: 9}}")
    with pytest.raises(ValueError, match=r"^ppo\.critic_engine\.deepspeed: zero_optimization\.stage=9"):
        run_of("stage=ppo", "ppo.critic_engine.deepspeed={zero_optimization: {stage: 9}}")
    with pytest.raises(ValueError, match=r"^sft\.engine\.deepspeed=nowhere\.json: there is no such file"):
        run_of("stage=sft", "sft.engine.deepspeed=nowhere.json")


def test_base64_stands_on_the_command_line_without_its_end():
    text = json.dumps(OFFLOAD | {"train_batch_size": 32})
    source = base64.urlsafe_b64encode(f"{text}{' ' * (1 - len(text) % 3)}".encode()).decode()
    run = run_of("stage=sft", f"engine.deepspeed={source.rstrip('=')}")
    assert source.endswith("=")
    assert (run.sft.engine.offload_optimizer, run.sft.global_batch_size) == (OffloadDevice.cpu, 32)


def test_optimizer_and_batch_go_to_the_stages(file):
    content = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 3e-6}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 5}},
        "gradient_clipping": 0.5,
    }
    run = run_of(f"engine.deepspeed={file(content)}", ranks=4)
    assert (run.sft.global_batch_size, run.ppo.minibatch_size) == (32, 32)
    assert (run.reward.micro_batch_size, run.ppo.micro_batch_size) == (2, 2)
    for optimizer in (run.sft.optimizer, run.reward.optimizer, run.ppo.actor_optimizer, run.ppo.critic_optimizer):
        assert (optimizer.lr, optimizer.betas, optimizer.eps) == (3e-6, [0.9, 0.999], 1e-8)
        assert (optimizer.max_grad_norm, optimizer.schedule) == (0.5, Schedule.warmup_cosine_lr)
        assert optimizer.schedule_options == {"warmup_num_steps": 5}


def test_the_settings_are_those_of_the_same_yaml(file):
    """A run started from a file and one started from settings resume each other."""
    from_file = run_of("stage=sft", f"engine.deepspeed={file(OFFLOAD)}")
    yaml = ["engine.zero_stage=3", "engine.offload_optimizer=cpu", "engine.precision=bf16"]
    assert settings_of(from_file, "sft") == settings_of(run_of("stage=sft", *yaml), "sft")


def test_what_is_saved_is_loaded_without_the_file(file, tmp_path):
    scheduler = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": 3}}
    run = run_of(f"engine.deepspeed={file(OFFLOAD | {'scheduler': scheduler})}")
    run = dataclasses.replace(run, output_dir=str(tmp_path / "out"))
    assert load_run(save_run(run)) == run


@pytest.mark.parametrize(
    ("content", "overrides", "sentence"),
    [
        (OFFLOAD, ["engine.zero_stage=2"], r"engine\.zero_stage=2 on the command line, but 3 by ds\.json:3: zero_opt"),
        (OFFLOAD, ["sft.engine.precision=fp32"], r"sft\.engine\.precision=fp32 on the command line, but bf16"),
        (OFFLOAD, ["engine=zero2"], r"engine\.zero_stage=2 on the command line, but 3"),
        ({"gradient_clipping": 2}, ["sft.optimizer.max_grad_norm=1"], r"max_grad_norm=1\.0 on the command line, but 2"),
        (
            {"train_batch_size": 32},
            ["sft.global_batch_size=64"],
            r"sft\.global_batch_size=64 on the command line, but 32",
        ),
        (
            {"train_micro_batch_size_per_gpu": 2},
            ["sft.micro_batch_size=4"],
            r"sft\.micro_batch_size=4.*but 2 by the ba",
        ),
    ],
)
def test_a_contradiction_of_the_command_line_ends_the_run(file, content, overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        run_of("stage=sft", f"engine.deepspeed={file(content)}", *overrides)


def test_the_command_line_stands_where_the_file_is_silent_or_agrees(file):
    source = f"engine.deepspeed={file(OFFLOAD | {'optimizer': {'type': 'AdamW', 'params': {}}})}"
    run = run_of("stage=sft", source, "engine=zero3", "engine.offload_param=cpu", "sft.optimizer.lr=1e-6")
    assert (run.sft.engine.offload_param, run.sft.optimizer.lr) == (OffloadDevice.cpu, 1e-6)  # not device and 1e-3
    assert (run.sft.engine.offload_optimizer, run.sft.optimizer.weight_decay) == (OffloadDevice.cpu, 0.0)


def test_a_batch_size_of_the_command_line_stands_where_the_file_gives_the_other(file):
    source = f"engine.deepspeed={file({'train_micro_batch_size_per_gpu': 2})}"
    assert run_of("stage=sft", source, ranks=2).sft.global_batch_size == 4  # one micro-batch each, as in DeepSpeed
    assert run_of("stage=sft", source, "sft.global_batch_size=32", ranks=2).sft.global_batch_size == 32


@pytest.mark.parametrize(
    ("content", "overrides", "sentence"),
    [
        ({"train_batch_size": 48}, ["stage=ppo"], r"rollout_size by ppo\.minibatch_size.*train_batch_size is ppo\."),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["stage=sft"],
         r"engine\.nvme_path is missing.*With the values of engine\.deepspeed"),
        ("{a: 1\n a: 2}", ["stage=sft"], r"ds\.json:2: a is there twice"),
        ({}, ["stage=sft", "sft.optimizer.schedule=warmup_lr", "++sft.optimizer.schedule_options.total_num_steps=3"],
         r"sft\.optimizer\.schedule_options: .*found total_num_steps, expected some of lr, warmup_num_steps"),
    ],
)  # fmt: skip
def test_values_that_the_run_cannot_have_are_refused(file, content, overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        run_of(f"engine.deepspeed={file(content)}", *overrides)


def test_actor_and_critic_must_agree_on_the_batch(file):
    actor, critic = file({"train_batch_size": 32}, "actor.json"), file({"train_batch_size": 64}, "critic.json")
    with pytest.raises(ValueError, match=r"ppo\.critic_engine\.deepspeed: ppo\.minibatch_size would be 64, but .* 32"):
        run_of("stage=ppo", f"ppo.engine.deepspeed={actor}", f"ppo.critic_engine.deepspeed={critic}")


def test_the_start_says_every_setting_with_its_origin(file, caplog):
    content = {
        "zero_optimization": {"stage": 2, "contiguous_gradients": True, "reduce_bucket_size": "auto"},
        "train_batch_size": 32,
        "wall_clock_breakdwn": False,
    }
    with caplog.at_level(logging.INFO, logger="rlhf.deepspeed.apply"):
        run_of("stage=[sft,ppo]", f"engine.deepspeed={file(content)}")
    text = caplog.text
    for line in (
        "engine.zero_stage = 2  <- ds.json:3: zero_optimization.stage  [sft, ppo actor, ppo reference, ppo reward,",
        "engine.reduce_bucket_size = 0  <- ds.json:5: zero_optimization.reduce_bucket_size is auto: the run's own",
        "engine.offload_optimizer = none  <- DeepSpeed's default of ds.json: zero_optimization.offload_optimizer",
        "global_batch_size = 32  <- the batch sizes of ds.json  [sft]",
        "minibatch_size = 32  <- the batch sizes of ds.json  [ppo]",
        "ignored: zero_optimization.contiguous_gradients (gradients of a block are contiguous in any case)",
        "ds.json: neither DeepSpeed nor this run reads wall_clock_breakdwn (did you mean wall_clock_breakdown?)",
    ):
        assert text.count(line) == 1, line


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.json")), ids=lambda path: path.stem)
def test_the_examples_are_read_without_a_warning(example, file, caplog):
    run = run_of(f"engine.deepspeed={file(example.read_text())}", ranks=2)
    assert {engine.deepspeed for engine in (run.engine, run.ppo.engine)} == {None}
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_the_ready_made_engines_say_where_states_rest():
    engines = [run_of("stage=sft", f"engine={name}").sft.engine for name in ("zero1_cpu", "zero2_cpu", "zero3_cpu")]
    assert [(engine.zero_stage, engine.offload_optimizer) for engine in engines] == [
        (n, OffloadDevice.cpu) for n in (1, 2, 3)
    ]
    nvme = run_of("stage=sft", "engine=zero3_nvme").sft.engine
    assert (nvme.offload_param, nvme.nvme_path) == (OffloadDevice.nvme, "/nowhere/nvme")


def test_a_run_starts_from_a_file_and_says_so(tmp_path):
    words = ["experiment=smoke", "stage=sft", "sft.max_steps=3", "sft.eval_rows=4", f"output_dir={tmp_path}"]
    words += [
        "tracking.report=false",
        "sft.optimizer.schedule=warmup_lr",
        "sft.optimizer.warmup_steps=3",
        "sft.optimizer.lr=1e-3",
    ]
    done = run_forked("run_pipeline.py", *words, "engine.deepspeed=examples/zero2_offload.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "engine.offload_optimizer = cpu  <- zero2_offload.json:4" in done.stdout + done.stderr
    run = load_run(tmp_path / "config.yaml")
    assert (run.sft.engine.zero_stage, run.sft.engine.offload_optimizer, run.sft.engine.deepspeed) == (
        2,
        OffloadDevice.cpu,
        None,
    )
    rows = [json.loads(line) for line in (tmp_path / "sft/metrics.jsonl").read_text().splitlines()]
    rates = [row["train/lr"] for row in rows if "train/lr" in row]
    assert rates == pytest.approx([0, 0, 1e-3 * 0.6309297535714574])  # log_3 of 1, 1, 2, as DeepSpeed's WarmupLR has it


def test_the_result_is_new_and_the_run_as_composed_is_untouched(file):
    run = composed(f"engine.deepspeed={file(OFFLOAD)}")
    before = dataclasses.asdict(run)
    with_deepspeed(run, ranks=1)
    assert dataclasses.asdict(run) == before
