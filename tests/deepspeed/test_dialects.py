"""Files that are not DeepSpeed's JSON: YAML of the same content, Accelerate's, and those of trainers."""

import json
from pathlib import Path

import pytest

from rlhf.config.engine_config import EngineConfig, Precision
from rlhf.config.engine_config import OffloadDevice as Offload
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.deepspeed.apply import fate_of, resolve
from rlhf.deepspeed.dialects import read_deepspeed
from rlhf.deepspeed.reader import parse

# As `accelerate config` writes it, and as the examples of TRL have it.
LAUNCHER = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: DEEPSPEED
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
num_machines: 1
num_processes: 8
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes a file beside others, and reads it from there."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def write(content, name="config.yaml"):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / name)

    return write


def resolved(source):
    document = read_deepspeed(source, setting="engine.deepspeed")
    return resolve(document, EngineConfig(zero_stage=0, precision="fp32"), optimizer=OptimizerConfig(lr=2e-5))


def values(source):
    return {name.partition(".")[2]: setting.value for name, setting in resolved(source).settings.items()}


def places(source):
    return {name.partition(".")[2]: setting.place for name, setting in resolved(source).settings.items()}


def accelerate(part, *, top="mixed_precision: bf16\n"):
    lines = "".join(f"  {name}: {value}\n" for name, value in part.items())
    return f"{LAUNCHER}{top}deepspeed_config:\n{lines}"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"zero_stage": 1}, {"zero_stage": 1, "offload_optimizer": Offload.none}),
        ({"zero3_init_flag": "true"}, {"zero_stage": 2}),  # the default of DeepSpeedPlugin
        (
            {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu",
             "offload_optimizer_nvme_path": "none", "zero3_save_16bit_model": "true", "zero3_init_flag": "true",
             "deepspeed_multinode_launcher": "standard", "gradient_clipping": 0.5, "gradient_accumulation_steps": 1},
            {"zero_stage": 3, "offload_optimizer": Offload.cpu, "offload_param": Offload.cpu, "max_grad_norm": 0.5,
             "nvme_path": None},
        ),
        (
            {"zero_stage": 3, "offload_optimizer_device": "nvme", "offload_param_device": "nvme",
             "offload_optimizer_nvme_path": "/fast", "offload_param_nvme_path": "/fast"},
            {"offload_optimizer": Offload.nvme, "offload_param": Offload.nvme, "nvme_path": "/fast"},
        ),
        ({"zero_stage": 2, "offload_param_device": "cpu"}, {"offload_param": Offload.none}),
    ],
)  # fmt: skip
def test_what_accelerate_says_of_deepspeed_is_read(file, part, expected):
    source = file(accelerate(part))
    found = values(source)
    assert {name: found.get(name) for name in expected} == expected
    assert found["precision"] is Precision.bf16
    document = read_deepspeed(source, setting="engine.deepspeed")
    assert document.content.get("gradient_accumulation_steps") == part.get("gradient_accumulation_steps")


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ("mixed_precision: fp16\n", Precision.fp16),
        ("mixed_precision: 'no'\n", Precision.fp32),
        ("mixed_precision: no\n", Precision.fp32),
        ("mixed_precision: BF16\n", Precision.bf16),
        ("fp16: true\n", Precision.fp16),
        ("fp16: false\nmixed_precision: bf16\n", Precision.bf16),
        ("", None),
    ],
)
def test_the_precision_is_accelerates(file, top, expected):
    assert values(file(accelerate({"zero_stage": 2}, top=top))).get("precision") == expected


def test_every_value_of_accelerate_has_its_line_and_every_setting_its_place(file):
    part = {"zero_stage": 3, "zero3_init_flag": "true", "gradient_accumulation_steps": 2, "offload_param_device": "cpu"}
    source = file(accelerate(part, top="mixed_precision: bf16\nnew_in_accelerate: 1\nfsdp_config: {a: 1}\n"))
    document, found = read_deepspeed(source, setting="engine.deepspeed"), resolved(source)
    assert places(source)["zero_stage"] == "config.yaml:20: deepspeed_config.zero_stage"
    assert places(source)["precision"] == "config.yaml:16: mixed_precision"
    assert places(source)["offload_param"] == "config.yaml:23: deepspeed_config.offload_param_device"
    assert {path for path in document.written if fate_of(found, path) is None} == {
        ("mixed_precision",),
        ("deepspeed_config", "zero_stage"),
        ("deepspeed_config", "offload_param_device"),
    }
    assert "launch.ranks" in fate_of(found, ("num_processes",))[1]
    assert found.warnings == ["config.yaml: neither Accelerate nor this run reads new_in_accelerate"]


DEEPSPEED = {"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}, "bf16": {"enabled": "auto"}}


@pytest.mark.parametrize("name", ["ds.json", "../ds.json"])
def test_the_file_that_accelerate_names_is_followed_beside_it_or_from_here(file, name):
    file(DEEPSPEED, "ds.json")
    source = file(accelerate({"deepspeed_config_file": name, "gradient_clipping": 2.0, "offload_param_device": "cpu"}))
    found, document = resolved(source), read_deepspeed(source, setting="engine.deepspeed")
    expected = {"zero_stage": 3, "offload_param": Offload.cpu, "precision": Precision.bf16, "max_grad_norm": 2.0}
    assert expected.items() <= values(source).items()
    assert places(source)["zero_stage"] == "ds.json:1: zero_optimization.stage"
    assert places(source)["max_grad_norm"].startswith("config.yaml:")
    assert ("zero_optimization", "stage") in document.written
    assert fate_of(found, ("deepspeed_config", "deepspeed_config_file"))[1].startswith("that file is read")


def test_without_a_precision_in_either_half_no_means_that_of_the_file(file):
    file({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "ds.json")
    part = {"deepspeed_config_file": "ds.json"}
    assert values(file(accelerate(part, top="mixed_precision: 'no'\n")))["precision"] is Precision.fp16
    with pytest.raises(ValueError, match=r"config.yaml:16: mixed_precision=bf16: but ds.json:1: fp16.enabled=True"):
        resolved(file(accelerate(part)))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (LAUNCHER.replace("DEEPSPEED", "FSDP"), "Accelerate with distributed_type=FSDP.*engine=zero3 .*FULL_SHARD"),
        (LAUNCHER.replace("DEEPSPEED", "MULTI_GPU"), "distributed_type=MULTI_GPU.*engine=zero0 with launch.ranks"),
        (LAUNCHER.replace("DEEPSPEED", "'NO'"), "distributed_type=NO.*engine=zero0"),
        (LAUNCHER.replace("DEEPSPEED", "NO"), "distributed_type=NO.*engine=zero0"),
        (LAUNCHER.replace("DEEPSPEED", "MEGATRON_LM"), "distributed_type=MEGATRON_LM.*engine=zero2"),
        (LAUNCHER.replace("LOCAL_MACHINE", "AMAZON_SAGEMAKER"), "Hugging Face Accelerate"),
        (accelerate({"zero_stge": 3}), r":18: .*zero_stge: there is no such key \(did you mean .*\.zero_stage\?"),
        (accelerate({"zero_stage": 7}), "deepspeed_config.zero_stage=7: expected 0, 1, 2 or 3"),
        (accelerate({"zero3_init_flag": "Treu"}), "zero3_init_flag='Treu': expected true or false"),
        (accelerate({"zero3_save_16bit_model": "Treu"}), "zero3_save_16bit_model='Treu': expected true or false"),
        (LAUNCHER.replace("use_cpu: false", "use_cpu: Treu"), ":15: use_cpu='Treu': expected true or false"),
        (LAUNCHER.replace("processes: 8", "processes: many"), ":9: num_processes='many': expected a number"),
        (accelerate({"offload_param_device": "disk"}), "offload_param_device='disk': expected none, cpu, nvme"),
        (accelerate({"zero_stage": 2}, top="mixed_precision: fp8\n"), "='fp8': expected no, fp16, bf16"),
        (accelerate({"deepspeed_config_file": "nowhere.json"}), "_file=nowhere.json: there is no such"),
        (f"{LAUNCHER}deepspeed_config: zero3\n", "deepspeed_config='zero3': expected an object"),
        ("output_dir: o\nlearning_rate: 2.0e-5\nfp16: true\ngradient_accumulation_steps: 8\ndeepspeed: cfg/z3.json\n",
         "of a Hugging Face trainer .*with output_dir, learning_rate.*engine.deepspeed=cfg/z3.json"),
        ("model_name_or_path: m\nper_device_train_batch_size: 1\nbf16: true\n", "Hugging Face trainer.*engine=zero2"),
        ("stage: sft\nfinetuning_type: lora\nmodel_name_or_path: m\ndeepspeed: z.json\n", "LLaMA-Factory.*z.json"),
        ("base_model: m\nmicro_batch_size: 2\noptimizer: adamw_torch\ndeepspeed: z.json\n", "Axolotl.*=z.json"),
        ("trainer:\n  deepspeed:\n    zero_optimization: {stage: 2}\n", "stands in its 'trainer.deepspeed'"),
        ("plugin:\n  zero_optimization: {stage: 2}\n  bf16: {enabled: true}\n", "in its 'plugin' is one: give that"),
        ("zero_optimisation:\n  stage: 2\n", r"zero_optimisation \(did you mean zero_optimization\?\)"),
        ("zero_stage: 3\noptimizer_tier: cpu\n", "found zero_stage.* at the top level"),
        ("- a\n", "found a list; expected an object"),
        ("a: [1\n", ":2: is not YAML"),
        ("zero_optimization:\n  stage: 3\n  stage: 2\n", ":3: zero_optimization.stage is there twice.*line 2"),
    ],
)  # fmt: skip
def test_what_is_not_for_deepspeed_is_refused_by_name(file, content, sentence):
    with pytest.raises(ValueError, match=f"config.yaml.*?({sentence})"):
        resolved(file(content))


def test_a_mapping_and_json_of_other_kinds_are_refused_as_well(file):
    for source in ({"output_dir": "x", "bf16": True}, file({"output_dir": "x", "bf16": True}, "args.json")):
        with pytest.raises(ValueError, match="of a Hugging Face trainer"):
            resolved(source)
    assert values({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}})["zero_stage"] == 1
    assert values(file({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}}, "a.json"))
    assert values(file(accelerate({"zero_stage": 3}), "no_suffix"))["zero_stage"] == 3


@pytest.mark.parametrize(
    "content",
    [
        {"train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate_of_mine": 1},
        {"zero_optimization": {"stage": 1}, "learning_rate": 1e-5, "output_dir": "x"},
        {"fp16": {"enabled": False}, "deepspeed": "x"},
        {"zero_optimization": True, "max_steps": 3},
        {},
        {"_comment": "nothing yet"},
    ],
)
def test_what_deepspeed_would_read_is_read_whatever_else_is_there(content):
    resolved(content)


def test_deepspeeds_own_configuration_may_be_yaml(file):
    text = """\
# with a comment
defaults: &defaults {pin_memory: true, device: none}
zero_optimization:
  stage: 3
  offload_optimizer: {<<: *defaults, device: cpu}
  offload_param: *defaults
optimizer:
  type: AdamW
  params:
    lr: 1e-5
    betas: [0.9, 0.95]
    weight_decay: 0.0
train_micro_batch_size_per_gpu: 2
"""
    found = values(file(text))
    assert (found["zero_stage"], found["offload_optimizer"], found["offload_param"]) == (
        3,
        Offload.cpu,
        Offload.none,
    )
    assert (found["lr"], found["betas"], found["weight_decay"]) == (1e-5, [0.9, 0.95], 0.0)
    assert places(file(text))["offload_optimizer"] == "config.yaml:5: zero_optimization.offload_optimizer.device"
    flow = "{zero_optimization: {stage: 2,}, // as in Hjson\n bf16: {enabled: true}}"
    assert values(file(flow))["zero_stage"] == values(file(flow, "ds.yml"))["zero_stage"] == 2


def test_yaml_that_contains_itself_ends():
    with pytest.raises(ValueError, match=r"f\.yaml:1: is not YAML: found unconstructable recursive node"):
        parse("a: &a\n  b: *a\n", name="f.yaml", is_yaml=True)


def test_a_file_of_accelerate_that_accelerate_itself_writes_is_read(tmp_path):
    config = pytest.importorskip("accelerate.commands.config.config_args")
    path = Path(tmp_path) / "default_config.yaml"
    config.ClusterConfig(
        compute_environment="LOCAL_MACHINE",
        distributed_type="DEEPSPEED",
        mixed_precision="bf16",
        use_cpu=False,
        debug=False,
        num_processes=2,
        deepspeed_config={"zero_stage": 3, "offload_optimizer_device": "cpu", "zero3_init_flag": True},
    ).to_yaml_file(path)
    found = resolved(str(path))
    assert found.warnings == []
    assert {"zero_stage": 3, "offload_optimizer": Offload.cpu}.items() <= values(str(path)).items()
