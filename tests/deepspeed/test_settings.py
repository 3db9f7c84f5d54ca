"""What each key becomes, in configurations of the shapes that public repositories have."""

import re

import pytest

from rlhf.config.engine_config import EngineConfig, GradDtype, MasterWeights, MomentDtype, Precision
from rlhf.config.engine_config import OffloadDevice as Offload
from rlhf.config.stage_configs import OptimizerConfig, Schedule
from rlhf.deepspeed.apply import fate_of, resolve
from rlhf.deepspeed.dialects import read_deepspeed
from rlhf.deepspeed.keys import TABLE


def own_engine(**settings):
    return EngineConfig(**{"zero_stage": 0, **settings})


def resolved(content, *, trains=True, **engine):
    optimizer = OptimizerConfig(lr=2e-5, weight_decay=0.05) if trains else None
    document = read_deepspeed(content, setting="ds.json")
    return resolve(document, own_engine(**engine), optimizer=optimizer)


def named(settings):
    return {name.partition(".")[2]: setting.value for name, setting in settings.items()}


def values(content, **settings):
    return named(resolved(content, **settings).settings)


def zero(**keys):
    return {"zero_optimization": keys}


def test_the_trainer_configuration_that_everybody_has():
    content = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
                 "hysteresis": 2, "min_loss_scale": 1},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW",
                      "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR",
                      "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
            "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    }  # fmt: skip
    own = own_engine()
    assert values(content) == {
        "zero_stage": 3,
        "offload_optimizer": Offload.cpu,
        "offload_param": Offload.cpu,
        "pin_memory": True,
        "overlap_comm": True,
        "sub_group_size": 1_000_000_000,
        "max_live_parameters": 1_000_000_000,
        "reduce_bucket_size": own.reduce_bucket_size,
        "prefetch_bucket_size": own.prefetch_bucket_size,
        "persistence_threshold": own.persistence_threshold,
        "precision": Precision.auto,
        "max_grad_norm": 1.0,
        "lr": 2e-5,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.05,
        "schedule": Schedule.warmup_lr,
        "schedule_options": {"warmup_max_lr": None},
    }
    found = resolved(content)
    assert found.warnings == []
    assert {".".join(path) for path in found.document.written if (fate_of(found, path) or [""])[0] == "ignored"} == {
        "zero_optimization.contiguous_gradients",
        "zero_optimization.stage3_max_reuse_distance",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "steps_per_print",
        "wall_clock_breakdown",
    }


def test_to_a_frozen_model_optimizer_and_scheduler_mean_nothing():
    content = {
        "optimizer": {"type": "Lamb", "params": {"max_coeff": 0.3}},
        "scheduler": {"type": "Cosine"},
        "gradient_clipping": 1.0,
        **zero(stage=3, offload_param={"device": "cpu"}),
    }
    found = values(content, trains=False)
    assert found == {"zero_stage": 3, "offload_optimizer": Offload.none, "offload_param": Offload.cpu}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (zero(), {"zero_stage": 0, "offload_optimizer": Offload.none, "offload_param": Offload.none}),
        (zero(stage="2"), {"zero_stage": 2}),
        (zero(stage="auto"), {"zero_stage": None}),
        (zero(stage=2, cpu_offload=True), {"offload_optimizer": Offload.cpu}),
        (zero(stage=2, cpu_offload=True, cpu_offload_use_pin_memory=False),
         {"offload_optimizer": Offload.cpu, "pin_memory": None}),  # which DeepSpeed does not read any more
        (zero(stage=3, cpu_offload_params=True, cpu_offload=False),
         {"offload_param": Offload.cpu, "offload_optimizer": Offload.none}),
        (zero(stage=3, cpu_offload_use_pin_memory=True, offload_optimizer={"device": "cpu", "pin_memory": False}),
         {"pin_memory": False}),
        (zero(stage=1, offload_optimizer={"device": "nvme", "nvme_path": "/d"}), {"offload_optimizer": Offload.nvme}),
        (zero(stage=2, offload_optimizer=None, offload_param={"device": "none"}), {"offload_optimizer": Offload.none}),
        (zero(stage=2, offload_param={"device": "cpu"}), {"offload_param": Offload.none}),
        (zero(stage=0, offload_optimizer={"device": "cpu"}), {"offload_optimizer": Offload.none}),
        (
            zero(
                stage=3,
                offload_optimizer={"device": "nvme", "nvme_path": "/a", "buffer_count": 4, "pipeline_read": True,
                                   "pipeline_write": False, "ratio": 0.3, "pin_memory": False, "fast_init": True},
                offload_param={"device": "nvme", "nvme_path": "/b", "buffer_count": 5, "buffer_size": 1e8,
                               "max_in_cpu": 1e9, "pin_memory": False},
            ),
            {"nvme_path": "/a", "buffer_count": 5, "buffer_size": 100_000_000, "parameters_in_cpu": 1_000_000_000,
             "pipeline_read": True, "pipeline_write": False, "optimizer_share": 0.3, "pin_memory": False},
        ),
        (
            zero(stage=3, offload_optimizer={"device": "cpu", "buffer_count": 9, "nvme_path": "/unused"}),
            {"buffer_count": None, "nvme_path": None},
        ),
        (zero(stage=3, offload_param={"device": "cpu", "pin_memory": True},
              offload_optimizer={"device": "cpu", "pin_memory": "false"}), {"pin_memory": True}),
        (zero(stage=2, reduce_bucket_size=5e8, overlap_comm="true"), {"reduce_bucket_size": 500_000_000,
                                                                      "overlap_comm": True}),
        (zero(stage=3, stage3_max_live_parameters=0, sub_group_size=0, stage3_prefetch_bucket_size=0),
         {"max_live_parameters": 1, "sub_group_size": None, "prefetch_bucket_size": 0}),
        (zero(stage=3, max_live_parameters=3e7, param_persistence_threshold=1e4, prefetch_bucket_size="10"),
         {"max_live_parameters": 30_000_000, "persistence_threshold": 10_000, "prefetch_bucket_size": 10}),
        (zero(stage=3, stage3_model_persistence_threshold="0"), {"persistence_threshold": 0}),
        (zero(stage=3, mics_shard_size=8), {"shard_ranks": 8}),
        (zero(stage=3, mics_shard_size=-1), {"shard_ranks": 0}),
        (zero(stage=2, mics_shard_size=8), {"shard_ranks": None}),  # MiCS is for stage 3 alone
        (zero(stage=3, stage3_param_persistence_threshold=9223372036854775807),
         {"persistence_threshold": 9223372036854775807}),
        (zero(stage=3, cpu_offload=True, offload_optimizer="auto"), {"offload_optimizer": Offload.cpu}),
        (zero(stage=3, offload_optimizer="auto"), {"offload_optimizer": None}),
        (zero(stage=3, stage3_model_persistence_threshold=1e6), {"persistence_threshold": None}),
    ],
)  # fmt: skip
def test_zero_and_its_tiers(content, expected):
    found = values(content)
    assert {name: found.get(name) for name in expected} == {
        name: own_engine().zero_stage if name == "zero_stage" and value is None else value
        for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("content", "own", "expected"),
    [
        ({}, "bf16", None),
        ({"bf16": {"enabled": True}}, "auto", "bf16"),
        ({"bfloat16": {"enabled": "true"}}, "auto", "bf16"),
        ({"fp16": {"enabled": True}}, "auto", "fp16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": "auto"}}, "bf16", "fp16"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": True}}, "fp16", "bf16"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, "fp16", "fp16"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, "auto", "auto"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, "fp32", "fp32"),
        ({"fp16": {"enabled": "auto"}}, "bf16", "bf16"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": False}}, "auto", "fp32"),
        ({"bf16": {"enabled": "auto"}}, "fp16", "fp32"),
        ({"fp16": {"enabled": False}}, "bf16", "fp32"),
        ({"fp16": {"loss_scale": 0}}, "bf16", "fp32"),
        ({"fp16": None}, "bf16", None),
        ({"fp16": "auto", "bf16": "auto"}, "bf16", None),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "fp32", "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "torch.bfloat16"}, "bf16": {"enabled": False}}, "auto", "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "BF16"}, "fp16": {"enabled": "auto"}}, "fp16", "bf16"),
        ({"torch_autocast": {"enabled": False}}, "fp32", None),
        ({"amp": {"enabled": False, "opt_level": "O1"}}, "bf16", None),
    ],
)
def test_precision(content, own, expected):
    found = values(content, precision=Precision(own)).get("precision")
    assert found == (None if expected is None else Precision(expected))


def test_the_loss_scale_is_the_files_and_its_gaps_are_deepspeeds_defaults():
    content = {"fp16": {"enabled": True, "initial_scale_power": 32, "loss_scale_window": 500, "min_loss_scale": 0.5}}
    found = values(content, hysteresis=7)
    assert {name: found[name] for name in ("initial_scale_power", "loss_scale_window", "min_loss_scale")} == {
        "initial_scale_power": 32,
        "loss_scale_window": 500,
        "min_loss_scale": 0.5,
    }
    assert (found["hysteresis"], found["loss_scale"], found["consecutive_hysteresis"]) == (2, 0, False)
    assert "hysteresis" not in values({"fp16": {"enabled": False, "hysteresis": 4}})


def test_optimizer_state_in_two_bytes_each():
    content = {"bf16": {"enabled": True, "bf16_optimizer_states": True, "bf16_master_weights_and_grads": True}}
    found = values(content)
    assert found["moments"] is MomentDtype.bf16
    assert found["master_weights"] is MasterWeights.split
    assert found["grad_accum_dtype"] is GradDtype.bf16
    assert {"moments", "master_weights", "grad_accum_dtype"}.isdisjoint(values({"bf16": {"enabled": True}}))


@pytest.mark.parametrize(
    ("dtype", "bf16", "expected"),
    [
        ("bf16", True, GradDtype.bf16),
        ("torch.bfloat16", True, GradDtype.bf16),
        ("fp32", True, GradDtype.fp32),
        ("fp16", True, GradDtype.fp32),
        ("bf16", False, GradDtype.fp32),
    ],
)
def test_gradients_are_summed_as_asked_where_weights_are_bf16(dtype, bf16, expected):
    content = {"bf16": {"enabled": bf16}, "data_types": {"grad_accum_dtype": dtype}}
    assert values(content)["grad_accum_dtype"] is expected


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(
    ("dtype", "expected"), [("bf16", GradDtype.bf16), ("FP32", GradDtype.fp32), ("fp16", GradDtype.fp32)]
)
def test_gradients_are_sent_as_asked_whatever_the_weights_are(dtype, expected, bf16):
    found = resolved({"bf16": {"enabled": bf16}, "communication_data_type": dtype})
    assert named(found.settings)["reduce_dtype"] is expected
    warned = [f"ds.json: communication_data_type={dtype}: engine.reduce_dtype stays fp32, which is more exact"]
    assert found.warnings == (warned if dtype == "fp16" else [])
    assert "reduce_dtype" not in values({"bf16": {"enabled": bf16}, "communication_data_type": "auto"})


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"partition_activations": False, "cpu_checkpointing": False, "number_checkpoints": None}, (None, None)),
        ({"partition_activations": True, "profile": True}, (True, None)),
        ({"cpu_checkpointing": True}, (True, True)),
        ({"contiguous_memory_optimization": True}, (True, None)),
        ({"number_checkpoints": 1}, (True, None)),
    ],
)
def test_activation_checkpointing(section, expected):
    found = values({"activation_checkpointing": section})
    assert (found.get("activation_checkpointing"), found.get("activation_offload")) == expected


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({"type": "Adam"}, {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}),
        ({"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 3e-7}},
         {"lr": 3e-5, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 3e-7}),
        ({"type": "AdamW", "params": {"torch_adam": True, "adam_w_mode": True, "lr": "1e-5"}},
         {"lr": 1e-5, "weight_decay": 0.01}),
        ({"type": "adam", "params": {"adam_w_mode": False, "weight_decay": 0, "amsgrad": False}}, {"weight_decay": 0}),
        ({"type": "Adam", "params": {"lr": "auto", "bias_correction": True, "max_grad_norm": 0}}, {"lr": 2e-5}),
        ({"type": "Adam", "params": {"lr": "auto", "bias_correction": 1, "max_grad_norm": 0.0}}, {"lr": 2e-5}),
        # What DeepSpeed 0.19.8 builds of them: AdamW for the type AdamW in any case, torch.optim.Adam for the last.
        ({"type": "AdamW", "params": {"adam_w_mode": False, "weight_decay": 0.1}}, {"weight_decay": 0.1}),
        ({"type": "Adam", "params": {"torch_adam": "torch_impl"}}, {"weight_decay": 0.01}),
        ({"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": False}}, {"weight_decay": 0.0}),
        ({"type": "AdamW", "params": "auto"}, {"lr": None, "weight_decay": None}),
        ({"params": {"lr": 1}}, {"lr": None}),
    ],
)  # fmt: skip
def test_adam_means_adamw(optimizer, expected):
    found = values({"optimizer": optimizer})
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("scheduler", "schedule", "options"),
    [
        ({"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4}}, "warmup_lr",
         {"warmup_max_lr": 1e-4, "warmup_num_steps": 1000}),
        ({"type": "WarmupLR"}, "warmup_lr", {"warmup_num_steps": 1000}),
        ({"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_min_lr": "auto",
                                              "warmup_num_steps": 1e2, "warmup_max_lr": "auto",
                                              "warmup_type": "linear"}}, "warmup_decay_lr",
         {"warmup_type": "linear", "warmup_max_lr": None, "warmup_num_steps": 100}),
        ({"type": "WarmupDecayLR", "params": {"total_num_steps": 500, "warmup_num_steps": 0}}, "warmup_decay_lr",
         {"total_num_steps": 500, "warmup_num_steps": 0}),
        ({"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "cos_min_ratio": 0.1, "last_batch_iteration": -1}},
         "warmup_cosine_lr", {"total_num_steps": 9, "cos_min_ratio": 0.1, "warmup_num_steps": 1000}),
        ({"type": "OneCycle", "params": {"cycle_min_lr": [1e-5], "cycle_max_lr": 1e-3, "cycle_momentum": False,
                                         "cycle_second_step_size": None}}, "one_cycle",
         {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-3, "cycle_momentum": False, "cycle_second_step_size": None}),
        ({"type": "LRRangeTest", "params": {"lr_range_test_staircase": "true", "lr_range_test_step_size": 200.0}},
         "lr_range_test", {"lr_range_test_staircase": True, "lr_range_test_step_size": 200}),
        ({"type": "WarmupLR", "params": {"warmup_min_lr": [1e-6], "warmup_max_lr": None, "warmup_num_steps": 200.0}},
         "warmup_lr", {"warmup_min_lr": 1e-6, "warmup_max_lr": None, "warmup_num_steps": 200}),
    ],
)  # fmt: skip
def test_schedules(scheduler, schedule, options):
    found = values({"scheduler": scheduler})
    assert (found["schedule"], found["schedule_options"]) == (Schedule(schedule), options)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (zero(stage=4), "zero_optimization.stage=4: expected 0, 1, 2 or 3"),
        (zero(stage=[0, 1]), r"zero_optimization.stage=\[0, 1\]: expected a number"),
        (zero(stage=2, stage3_max_live_params=1), r"no such key \(did you mean .*stage3_max_live_parameters"),
        (zero(offload_optimizer={"device": "cpu", "buffer_size": 1}), r"did you mean .*offload_param.buffer_size"),
        (zero(stage=2, offload_optimizer={"device": "gpu"}), "device='gpu': expected none, cpu, nvme"),
        (
            zero(stage=2, offload_optimizer={"device": "CPU"}),
            "device='CPU': expected none, cpu, nvme. Write it in lower",
        ),
        (
            zero(cpu_offload=True, offload_optimizer={"device": "nvme"}),
            "offload_optimizer is there too, with device=nv",
        ),
        (zero(stage=2, cpu_offload=True, offload_optimizer="cpu"), "offload_optimizer='cpu': expected an object"),
        (
            zero(stage=3, offload_param={"device": "nvme", "nvme_path": ["/a"]}),
            r"nvme_path=\['/a'\]: expected the path",
        ),
        (zero(stage=3, stage3_model_persistence_threshold="x"), "threshold='x': expected a number"),
        ({"zero_optimization": {1: 2}}, "zero_optimization.1: there is no such key"),
        (zero(**{"offload_optimizer.device": "cpu"}), "device: there is no such key .a dot does not nest"),
        (zero(offload_optimzer={"device": "cpu"}), "did you mean zero_optimization.offload_optimizer"),
        (zero(stage=2, offload_optimizer="cpu"), "offload_optimizer='cpu': expected an object"),
        (zero(stage=3, zero_quantized_gradients=True), "zero_quantized_gradients=True: cannot be honoured"),
        (zero(zenflow={"topk_ratio": 0.1}), "zenflow: cannot be honoured.*old gradients"),
        ({"fp16": True}, "fp16=True: expected an object"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "expected one of them"),
        ({"fp16": {"enabled": "FP16,"}}, "a text without quotes|A text without quotes"),
        ({"fp16": {"enabled": True, "init_scale_power": 1}}, "did you mean fp16.initial_scale_power"),
        ({"gradient_clipping": -1}, "gradient_clipping=-1: expected a number of 0 or more"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op='sum': cannot be honoured"),
        (
            {"optimizer": {"type": "OneBitAdam", "params": {"freeze_step": 400}}},
            "type='OneBitAdam': cannot be honoured",
        ),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}}, "adam_w_mode=False"),
        ({"optimizer": {"type": "Adam", "params": {"bias_correction": False}}}, "bias_correction=False"),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1}}}, "write gradient_clipping"),
        ({"optimizer": {"type": "Adam", "params": {"learning_rate": 1}}}, "params.learning_rate: there is no such key"),
        ({"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}, "betas=0.9: expected a list of two"),
        ({"scheduler": {"type": "CosineAnnealingLR"}}, "expected one of WarmupLR, WarmupDecayLR"),
        ({"scheduler": {"type": ["WarmupLR"]}}, "expected one of WarmupLR, WarmupDecayLR"),
        ({"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 9}}}, "WarmupLR has no such parameter"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": [0, 1]}}}, "one number for all parameters"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size=2: cannot be honoured"),
        ({"pipeline": {"stages": 2}}, "pipeline.stages=2: cannot be honoured"),
        ({"sequence_parallel_size": 4}, "sequence_parallel_size=4"),
        ({"elasticity": {"enabled": True}}, "elasticity: cannot be honoured"),
        ({"curriculum_learning": {"enabled": True, "schedule_config": {}}}, "curriculum_learning"),
        ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention"),
        ({"data_efficiency": {"enabled": True, "data_routing": {"enabled": True}}}, "data_efficiency.data_routing"),
        ({"compression_training": {"layer_reduction": {"enabled": True}}}, "compression_training"),
        ({"amp": {"enabled": True}}, "amp: cannot be honoured"),
        # what nothing here depends on is checked all the same
        (zero(contiguous_gradients="Treu"), "contiguous_gradients='Treu': expected true or false, or auto"),
        (zero(contiguous_gradients=2), "contiguous_gradients=2: expected true or false"),
        (zero(allgather_bucket_size="large"), "allgather_bucket_size='large': expected a number, or auto"),
        (zero(stage3_max_reuse_distance=1.5), "stage3_max_reuse_distance=1.5: expected a whole number"),
        (zero(stage3_gather_fp16_weights_on_model_save="Treu"), "stage3_gather_fp16_weights_on_model_save='Treu'"),
        (zero(leaf_module=3), "leaf_module=3: expected an object"),
        (zero(stage=3, offload_optimizer={"device": "cpu", "buffer_count": "many"}), "buffer_count='many'"),
        (zero(stage=3, offload_optimizer={"device": "cpu", "fast_init": "Treu"}), "fast_init='Treu'"),
        (zero(cpu_offload_use_pin_memory="Treu"), "cpu_offload_use_pin_memory='Treu'"),
        (
            {"bf16": {"enabled": True}, "fp16": {"loss_scale_window": "Treu"}},
            "loss_scale_window='Treu': expected a num",
        ),
        ({"bf16": {"enabled": True, "check_grad_overflow": "Treu"}}, "check_grad_overflow='Treu'"),
        ({"wall_clock_breakdown": "Treu"}, "wall_clock_breakdown='Treu': expected true or false"),
        ({"steps_per_print": "often"}, "steps_per_print='often': expected a number"),
        ({"communication_data_type": "fp64"}, "communication_data_type='fp64': expected fp16, bf16, fp32"),
        ({"data_types": {"grad_accum_dtype": "fp31"}}, "grad_accum_dtype='fp31': expected fp16, bf16"),
        ({"tensorboard": {"enabled": "Treu"}}, "tensorboard.enabled='Treu': expected true or false"),
        ({"flops_profiler": {"enabled": False, "detailed": "Treu"}}, "flops_profiler.detailed='Treu'"),
        ({"hybrid_engine": {"max_out_tokens": "Treu"}}, "hybrid_engine.max_out_tokens='Treu': expected a number"),
        ({"comms_logger": {"prof_ops": "all_reduce"}}, "comms_logger.prof_ops='all_reduce': expected a list"),
        ({"wandb": {"project": ["a"]}}, r"wandb.project=\['a'\]: expected a text"),
        ({"tensorboard": True}, "tensorboard=True: expected an object"),
        ({"optimizer": {"type": "Adam", "params": {"fused": "Treu"}}}, "params.fused='Treu'"),
        ({"aio": {"single_submit": "Treu"}}, "aio.single_submit='Treu'"),
        # other ways to say the precision
        (
            {"torch_autocast": {"enabled": True}, "bf16": {"enabled": True}},
            "torch_autocast.enabled=true, with dtype=None: expected dtype=bfloat16.*switch on bf16 or fp16 instead",
        ),
        (
            {"bf16": {"enabled": True}, "torch_autocast": {"enabled": True, "dtype": "float16"}},
            "with dtype=float16: expected dtype=bfloat16",
        ),
        (
            {"fp16": {"enabled": True}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
            "with dtype=bfloat16: expected .*fp16 off",
        ),
        ({"torch_autocast": {"enabled": False, "dtype": "float31"}}, "dtype='float31': expected fp16"),
        ({"torch_autocast": {"lower_precision_safe_modules": "torch.nn.Linear"}}, "safe_modules='.*': expected a list"),
        ({"data_types": {"param_dtype": "fp16"}}, "param_dtype='fp16': cannot be honoured.*bf16.enabled say"),
    ],
)
def test_what_is_wrong_or_not_here_is_refused(content, sentence):
    with pytest.raises(ValueError, match=f"ds.json: .*({sentence})"):
        resolved(content)


def test_all_that_is_refused_is_said_at_once():
    with pytest.raises(
        ValueError, match="(?s)amp: cannot.*sparse_attention: cannot.*stagee: there is no.*dump_state='x'"
    ):
        resolved({"amp": {"enabled": True}, "sparse_attention": {"mode": "fixed"}, **zero(stagee=1), "dump_state": "x"})


@pytest.mark.parametrize(
    "content",
    [
        zero(contiguous_gradients="yes", reduce_scatter=1.0, round_robin_gradients="off", legacy_stage1="F"),
        zero(allgather_bucket_size=5e8, stage3_max_reuse_distance="1e9", zero_hpz_partition_size=True),
        zero(reduce_bucket_size="5e8", sub_group_size="1e9", leaf_module={"classes": ["A"]}, mics_shard_size=-1),
        {"steps_per_print": float("inf"), "wall_clock_breakdown": "false", "communication_data_type": "BF16"},
        {"flops_profiler": {"enabled": False, "module_depth": -1, "output_file": None}, "log_level": 3},
        {"checkpoint": {"writer": {"type": "FAST"}, "load_universal": 0}, "pipeline": {"partition": "best"}},
        {"data_types": {"grad_accum_dtype": "torch.bfloat16", "keep_in_fp32_modules": "auto", "param_dtype": "auto"}},
        {"torch_autocast": {"enabled": False, "dtype": "float16"}, "bf16": {"enabled": True}},
        {"torch_autocast": {"enabled": True, "dtype": "bf16"}, "bf16": {"enabled": True}},
        {"autotuning": {"enabled": True, "arg_mappings": {"a": "b"}}},
        {"optimizer": {"type": "Adam", "legacy_fusion": "no", "params": {"torch_adam": "torch_impl"}}},
    ],
)  # fmt: skip
def test_what_deepspeed_takes_is_taken(content):
    """Values that DeepSpeed 0.19.8 reads, through pydantic or without a check."""
    resolved(content)


def test_what_is_switched_off_is_not_refused():
    content = {
        "amp": {"enabled": "auto"},
        "elasticity": {"enabled": False, "max_train_batch_size": 1},
        "curriculum_learning": {"enabled": False},
        "data_efficiency": {"enabled": False, "data_routing": {"enabled": True}},
        "compression_training": {
            "weight_quantization": {
                "shared_parameters": {"enabled": False},
                "different_groups": {"wq1": {"params": {"start_bits": 8}}},
            }
        },
        "pipeline": {"stages": "auto", "partition": "best"},
        "tensor_parallel": {"autotp_size": 1, "tp_overlap_comm": False},
        "zero_optimization": {"stage": 1, "zenflow": None, "zero_quantized_gradients": False},
        "sequence_parallel_size": 1,
        "gradient_allreduce_op": "mean",
    }
    assert values(content)["zero_stage"] == 1


def test_unknown_keys_that_deepspeed_ignores_are_only_warned_about():
    found = resolved({"grandient_accumulation_steps": 1, "aio": {"thread_count": 8, "blocksize": 1}, "_comment": "x"})
    assert found.warnings == [
        "ds.json: neither DeepSpeed nor this run reads grandient_accumulation_steps (did you mean "
        "gradient_accumulation_steps?), aio.blocksize (did you mean aio.block_size?)"
    ]


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("optimiser", "optimizer"),
        ("schedular", "scheduler"),
        ("activation_checkpoint", "activation_checkpointing"),
        ("Train_Batch_Size", "train_batch_size"),
        ("offload_optimizer", "zero_optimization.offload_optimizer"),
    ],
)
def test_a_whole_section_that_nobody_reads_is_named_with_its_right_name(misspelt, meant):
    hint = rf"{misspelt} \(did you mean {meant}\?\)"
    with pytest.raises(ValueError, match=rf"^ds\.json: found {hint} at the top level, none of which is a key"):
        resolved({misspelt: {"device": "cpu"}})
    warnings = resolved({"steps_per_print": 1, misspelt: {"device": "cpu"}}).warnings
    assert re.fullmatch(f"ds.json: neither DeepSpeed nor this run reads {hint}", warnings[0])


@pytest.mark.parametrize("content", [{"zero_optimization.stage": 3, "bf16.enabled": True}, {"fp16.enabled": {}}])
def test_a_dot_in_a_name_is_no_path(content):
    found = resolved({"steps_per_print": 1} | content)
    assert found.settings == {}
    assert found.warnings[0].count("(a dot does not nest)") == len(content)
    with pytest.raises(ValueError, match="a dot does not nest"):
        resolved(content)


def test_a_limit_on_all_persistent_parameters_is_said_not_to_be_kept():
    assert (
        "=10: a limit on all of them together is not kept"
        in resolved(zero(stage=3, stage3_model_persistence_threshold=10)).warnings[0]
    )
    assert resolved(zero(stage=3, stage3_model_persistence_threshold=9223372036854775807)).warnings == []


def test_a_section_that_is_auto_as_a_whole_is_the_runs_own():
    sections = ("zero_optimization", "optimizer", "scheduler", "fp16", "bf16", "activation_checkpointing", "aio")
    found = resolved(dict.fromkeys(sections, "auto"))
    assert (found.settings, found.warnings) == ({}, [])


def test_auto_is_fine_everywhere():
    """Whatever a key means, auto is no mistake."""
    content = {}
    for key in TABLE:
        *parents, name = key.path.removesuffix(".*").split(".")
        part = content
        for parent in parents:
            part = part.setdefault(parent, {})
        part.setdefault(name, "auto")
    for old in ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"):
        content["zero_optimization"].pop(old)
    content["scheduler"] = {"type": "auto"}
    content["data_efficiency"] = {"enabled": False}
    found = resolved(content, zero_stage=2)
    before = {**vars(own_engine(zero_stage=2)), **vars(OptimizerConfig(lr=2e-5, weight_decay=0.05))}
    assert [name for name, value in named(found.settings).items() if before[name] != value] == []
