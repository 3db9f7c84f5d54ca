"""Whatever an accepted configuration has, the start says what becomes of it: no value is passed over in silence."""

import dataclasses
import json
import logging
import random
import re

import pytest

from rlhf.config.engine_config import Precision
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.deepspeed.apply import with_deepspeed
from rlhf.deepspeed.keys import TABLE, Decision, Kind
from rlhf.deepspeed.reader import leaves
from tests.deepspeed.test_apply import composed

_BY_KIND = {
    Kind.integer: 7,
    Kind.number: 0.5,
    Kind.switch: True,
    Kind.text: "x",
    Kind.folder: "x",
    Kind.items: ["x"],
    Kind.section: {"enabled": False, "anything": {"deeper": 1}},
    Kind.other: "x",
}
_OWN_VALUES = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 16,
    "optimizer.params.betas": [0.9, 0.99],
    "optimizer.params.max_grad_norm": 0,
    "scheduler.type": "WarmupLR",
    "scheduler.params.warmup_min_lr": 0.1,
    "scheduler.params.warmup_max_lr": 0.2,
    "scheduler.params.warmup_num_steps": 3,
    "scheduler.params.warmup_type": "linear",
    "torch_autocast.dtype": "bfloat16",
    "zero_optimization.stage": 3,
    "zero_optimization.offload_optimizer.device": "cpu",
    "zero_optimization.offload_param.device": "cpu",
}
_OTHER_SCHEDULES = [
    key.path for key in TABLE if key.path.startswith("scheduler.params.") and key.path not in _OWN_VALUES
]


def value_of(key):
    """One that is accepted."""
    if key.path in _OWN_VALUES:
        return _OWN_VALUES[key.path]
    if key.decision is Decision.refused:
        return key.allowed[0] if key.allowed else {"enabled": False, "x": {"y": 1}}
    return key.among[1] if key.among else _BY_KIND[key.kind]


def configuration(chosen, *, draw=None):
    """The chosen keys, nested; `draw` varies spelling and values."""
    content = {}
    for key in chosen:
        *parents, name = key.path.removesuffix(".*").split(".")
        part = content
        for parent in parents:
            part = part.setdefault(parent, {})
        value = value_of(key)
        if draw:
            name = draw.choice([name, name, *key.old_names])
            others = [False, True] if key.kind is Kind.switch else []
            value = draw.choice([value, value, value, "auto", None, *others])
        part[name] = value
    both = [content.get(half, {}).get("enabled") for half in ("fp16", "bf16")]
    if None not in both:
        content["fp16"]["enabled"] = False
    if content.get("torch_autocast", {}).get("enabled"):
        content["torch_autocast"]["dtype"] = "bfloat16"
        if "fp16" in content:
            content["fp16"]["enabled"] = False
    return content


def said_of(content, caplog, *, stage="sft"):
    """What the start says of a configuration of one stage."""
    caplog.clear()
    run = composed(f"stage={stage}")
    config = getattr(run, stage)
    engine = dataclasses.replace(config.engine, deepspeed=content)
    with caplog.at_level(logging.INFO, logger="rlhf.deepspeed.apply"):
        with_deepspeed(dataclasses.replace(run, **{stage: dataclasses.replace(config, engine=engine)}), ranks=1)
    return caplog.text


def unsaid(content, text):
    words = set(re.findall(r"[\w./#-]+", text))
    return [".".join(path) for path in leaves(content) if ".".join(path) not in words]


ALL = [key for key in TABLE if key.path not in _OTHER_SCHEDULES]
OLD_OFFLOAD, NEW_OFFLOAD = "zero_optimization.cpu_offload", "zero_optimization.offload_"  # exclude each other


@pytest.mark.parametrize(
    "key", [key for key in ALL if not key.path.startswith("scheduler.params")], ids=lambda k: k.path
)
def test_every_key_alone_has_a_line(key, caplog):
    for content in (configuration([key]), *(_renamed(key, old) for old in key.old_names)):
        assert unsaid(content, said_of(content, caplog)) == []


def _renamed(key, old):
    return configuration([dataclasses.replace(key, path=".".join([*key.path.split(".")[:-1], old]))])


@pytest.mark.parametrize("seed", range(60))
def test_every_key_in_company_has_a_line(seed, caplog):
    draw = random.Random(seed)
    share = draw.choice([0.05, 0.3, 0.8])
    left_out = (NEW_OFFLOAD, OLD_OFFLOAD)[seed % 2]
    keys = [key for key in ALL if draw.random() < share and not key.path.startswith(left_out)]
    content = configuration(keys, draw=draw)
    content |= {"_comment": "mine", "unknown": {"of": {"nobody": 1}}, "another": [1]} if keys else {}
    stage = draw.choice(["sft", "eval"])  # where something learns, and where nothing does
    assert unsaid(content, said_of(content, caplog, stage=stage)) == []


@pytest.mark.parametrize(
    "content",
    [
        {"bf16": {"enabled": True}, "bfloat16": {"enabled": False}, "fp16": {"enabled": False, "loss_scale": 0}},
        {"bf16": {"enabled": True}, "fp16": {"enabled": "auto", "hysteresis": 2, "min_loss_scale": 1}},
        {"fp16": {"enabled": False, "loss_scale": 3, "auto_cast": True}, "torch_autocast": {"enabled": False}},
        {"fp16": "auto", "bf16": None, "zero_optimization": True, "scheduler": None, "optimizer": "auto"},
        {"zero_optimization": {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}},
        {"zero_optimization": {"stage": 3, "cpu_offload": False, "cpu_offload_params": True,
                               "cpu_offload_use_pin_memory": True, "offload_optimizer": {"pin_memory": False}}},
        {"zero_optimization": {"stage": 1, "cpu_offload_use_pin_memory": True, "stage3_max_live_parameters": 0,
                               "sub_group_size": 0, "stage3_model_persistence_threshold": 9223372036854775807}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/", "buffer_count": 3},
                               "offload_param": {"device": "nvme", "nvme_path": "/b", "buffer_count": 5}}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "none", "nvme_path": "/b", "buffer_count": 5}}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": "auto", "offload_param": {"device": "cpu"}}},
        {"optimizer": {"params": {"lr": 1, "betas": [0, 1]}}, "scheduler": {"params": {"warmup_num_steps": 3}}},
        {"optimizer": {"type": "AdamW", "params": "auto"}, "gradient_clipping": None, "amp": {"enabled": False}},
        {"data_efficiency": {"enabled": False, "data_routing": {"enabled": True, "random_ltd": {"x": 1}}}},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "bf16": {"enabled": True, "auto_cast": False}},
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": [1], "decay_lr_rate": "auto",
                                                      "last_batch_iteration": -1, "cycle_second_step_size": None}}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": [0.1], "warmup_type": "odd",
                                                      "warmup_num_steps": "auto", "last_batch_iteration": -1}}},
        {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": None},
        {"activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True, "profile": False,
                                      "contiguous_memory_optimization": False, "number_checkpoints": 0}},
        {"steps_per_print": 1, "unknown_keys": {f"number{n}": {"x": n} for n in range(12)}},
    ],
    ids=lambda content: json.dumps(content)[:60],
)  # fmt: skip
def test_what_is_merged_or_switched_off_has_a_line(content, caplog):
    for stage in ("sft", "eval"):
        assert unsaid(content, said_of(content, caplog, stage=stage)) == []


def test_a_value_that_one_model_uses_is_not_said_to_have_no_effect(caplog):
    content = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}, "gradient_clipping": 0.5}
    text = said_of(content, caplog, stage="ppo")
    assert "optimizer.lr = 1e-05  <- ppo.engine.deepspeed: optimizer.params.lr  [ppo actor]" in text
    assert not re.search(r"no effect:.*(params\.lr|gradient_clipping)", text)


def test_what_the_command_line_says_too_keeps_its_line(caplog):
    run = composed("engine.deepspeed={zero_optimization: {stage: 3}}", "stage=sft", "engine.zero_stage=3")
    with caplog.at_level(logging.INFO, logger="rlhf.deepspeed.apply"):
        with_deepspeed(run, ranks=1, overridden=["engine.zero_stage"])
    assert "engine.zero_stage = 3  <- engine.deepspeed: zero_optimization.stage" in caplog.text


def test_the_lines_are_of_settings_that_the_run_then_has(caplog):
    content = {"bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}
    assert said_of(content, caplog)
    run = composed("stage=sft")
    sft = dataclasses.replace(run.sft, engine=dataclasses.replace(run.sft.engine, deepspeed=content))
    found = with_deepspeed(dataclasses.replace(run, sft=sft), ranks=1).sft
    assert (found.engine.precision, found.optimizer) == (
        Precision.bf16,
        OptimizerConfig(
            **{**vars(run.sft.optimizer), "lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
        ),
    )
