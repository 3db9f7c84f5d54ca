"""`"auto"` in a DeepSpeed configuration becomes what Transformers' own code makes of it, and so do the complaints."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.deepspeed.reader import parse
from rlhf.hf import TrainingArguments
from rlhf.hf_trainer.auto_values import AutoValues

ADAM = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"}
BUCKETS = {
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}
EVERYTHING = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": ADAM},
    "scheduler": {"type": "WarmupDecayLR", "params": WARMUP},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto", **BUCKETS},
}
NOTHING_FITS = {
    "train_batch_size": 7,
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 9,
    "gradient_clipping": 0.25,
    "optimizer": {"type": "AdamW", "params": {"lr": 1.0, "betas": [0.5, 0.5], "eps": 1.0, "weight_decay": 0.5}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 1.0, "warmup_max_lr": 1.0, "warmup_num_steps": 1000, "total_num_steps": 5},
    },
    "fp16": {"enabled": False},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, **BUCKETS},
}
SMALL = [
    {"zero_optimization": {"stage": "auto", **BUCKETS}},
    {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": "auto"}},
    {"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam", "params": {"lr": 5e-5, "betas": "auto"}}},
    {"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}, "fp16": {"enabled": "auto"}},
]
ARGUMENTS = [
    {},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_grad_norm": 0.3, "bf16": True},
    {"learning_rate": 3e-4, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.1, "warmup_steps": 0.25},
    {"warmup_steps": 12, "save_on_each_node": True, "bf16_full_eval": True, "label_smoothing_factor": 0.1},
]
ROOT = Path(__file__).parents[2]


def configurations():
    files = [parse(file.read_text(), name=file.name).content for file in sorted(ROOT.glob("examples/*.json"))]
    assert len(files) >= 3
    return [EVERYTHING, NOTHING_FITS, *SMALL, *files]


@pytest.fixture(scope="module")
def cases():
    found = [[content, options, 48, 100] for content in configurations() for options in ARGUMENTS]
    return [*found, [EVERYTHING, {}, None, 100]]


@pytest.fixture(scope="module")
def expected(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle")
    (folder / "cases.json").write_text(json.dumps(cases))
    words = [sys.executable, str(ROOT / "tests/hf/oracle.py"), str(folder / "stub"), str(folder / "cases.json")]
    subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    return json.loads((folder / "cases.found").read_text())


def filled(content, options, width, steps):
    auto = AutoValues(copy.deepcopy(content))
    args = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", **options)
    try:
        auto.fill_arguments(args)
        if auto.content["zero_optimization"].get("stage") == "auto":
            auto.content["zero_optimization"]["stage"] = 2
        auto.fill_hidden_size(
            SimpleNamespace(config=SimpleNamespace(**({} if width is None else {"hidden_size": width})))
        )
        auto.fill_steps(args, steps)
        auto.require_match()
    except ValueError as error:
        return str(error)
    return auto.content


def test_values_and_complaints_are_those_of_transformers(cases, expected):
    kinds = set()
    for case, theirs in zip(cases, expected, strict=True):
        ours = filled(*case)
        kinds.add(type(theirs))
        if isinstance(theirs, str) and "hidden_size" in theirs:
            assert "hidden_size" in ours
            assert all(f"zero_optimization.{key}" in ours for key in BUCKETS)
        else:
            assert ours == theirs, case
    assert kinds == {dict, str}
    assert any(isinstance(theirs, str) and theirs.count("\n- ") == 12 for theirs in expected)


def test_what_accelerate_fills(monkeypatch):
    zero = {"stage": "auto", "offload_optimizer": {"device": "auto"}, "offload_param": {"device": "auto"}}
    args = TrainingArguments(output_dir="unused", use_cpu=True, bf16=True)
    auto = AutoValues({"zero_optimization": copy.deepcopy(zero), "fp16": {"enabled": False}})
    auto.fill_environment(args)
    assert auto.content["zero_optimization"]["stage"] == 2
    assert auto.content["zero_optimization"]["offload_param"]["device"] == "none"
    assert auto.content["bf16"] == {"enabled": True}
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    auto = AutoValues({"zero_optimization": copy.deepcopy(zero)})
    auto.fill_environment(args)
    assert auto.content["zero_optimization"]["stage"] == 3
    assert auto.content["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    with pytest.raises(ValueError, match="zero_optimization"):
        AutoValues({"bf16": {"enabled": True}}).fill_environment(args)


def test_a_users_mapping_is_left_alone():
    given = copy.deepcopy(EVERYTHING)
    args = TrainingArguments(output_dir="unused", use_cpu=True, deepspeed=given)
    assert given == EVERYTHING
    assert args.deepspeed is given
    assert args.zero_settings.document.content["gradient_clipping"] == 1.0
