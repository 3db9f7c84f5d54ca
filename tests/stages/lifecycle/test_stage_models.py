"""Folders of adapted models: what was learnt is in them, their record says so, and opening one says what it loses."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.config.engine_config import EngineConfig, Precision
from rlhf.config.run_config import Embedded
from rlhf.config.stage_configs import LoraConfig, OptimizerConfig
from rlhf.engine.engine import build_engine
from rlhf.models.causal_lm import causal_lm
from rlhf.models.embedded import prepare
from rlhf.models.lora import adapted_layers
from rlhf.runtime.dist import World
from rlhf.text.tokenizer import load_tokenizer
from stages.lifecycle.stage_models import export_model, open_engine
from stages.lifecycle.stage_record import StageRecord, write_record
from tests.engine import scenarios


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return prepare(Embedded.tiny, tmp_path_factory.mktemp("base") / "model")


def config(precision=Precision.bf16):
    return EngineConfig(zero_stage=0, precision=precision)


def engine_of(base, *, size, rank=4, precision=Precision.bf16):
    """A model whose B is normal of that size."""
    engine = build_engine(
        causal_lm(base, lora=LoraConfig(rank=rank, alpha=4.0)),
        config=config(precision),
        world=World.alone(),
        optimizer=OptimizerConfig(lr=1.0),
        total_steps=1,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, size)
    return engine


def kept_of(engine, folder):
    """Share of the adapters' change in the weights of `folder`, along its direction, in fp64."""
    found = exact = 0.0
    stored = load_file(folder / "model.safetensors")
    for name, layer in adapted_layers(engine.module).items():
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        change = layer.scaling["default"] * b @ a
        found += ((stored[f"{name}.weight"].double() - layer.base_layer.weight) * change).sum().item()
        exact += change.square().sum().item()
    return found / exact


def test_adapters_that_bf16_would_lose_are_stored_in_fp32_and_what_opens_them_in_bf16_says_so(base, tmp_path, caplog):
    engine, folder = engine_of(base, size=1e-4), tmp_path / "model"
    with caplog.at_level(logging.INFO):
        merge = export_model(engine, folder, tokenizer=load_tokenizer(str(base)))
    assert (merge["summed_in"], merge["stored_in"], merge["working_type"]) == ("float32", "float32", "bfloat16")
    assert merge["kept_in_working_type"] < 0.9
    assert merge["kept"] == pytest.approx(kept_of(engine, folder), abs=1e-3)
    assert merge["kept"] > 0.99
    assert f"bfloat16 would keep only {merge['kept_in_working_type']:.1%} of what they change" in caplog.text
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    assert (folder / "adapter/adapter_model.safetensors").exists()

    write_record(StageRecord("sft", "t", pad_id=0, merged={"model": merge}), folder)
    for precision, lines in {Precision.fp32: 0, Precision.bf16: 1}.items():
        caplog.clear()
        open_engine(causal_lm(folder), config=config(precision), world=World.alone())
        assert caplog.text.count("round it away again") == lines


def test_masters_start_from_all_of_an_fp32_folder(base, tmp_path):
    folder = tmp_path / "model"
    export_model(engine_of(base, size=1e-4), folder, tokenizer=load_tokenizer(str(base)))
    next_stage = open_engine(
        causal_lm(folder),
        config=config(),
        world=World.alone(),
        optimizer=OptimizerConfig(lr=1.0),
        total_steps=1,
    )
    stored = load_file(folder / "model.safetensors")
    masters = scenarios.weights(next_stage, masters=True)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in masters.items())


@pytest.mark.parametrize(("precision", "stored"), [(Precision.bf16, "bfloat16"), (Precision.fp32, "float32")])
def test_adapters_that_the_working_type_keeps_are_stored_in_it(base, tmp_path, precision, stored, caplog):
    engine, folder = engine_of(base, size=0.1, precision=precision), tmp_path / "model"
    with caplog.at_level(logging.INFO):
        merge = export_model(engine, folder, tokenizer=load_tokenizer(str(base)))
    assert (merge["stored_in"], merge["working_type"]) == (stored, stored)
    assert merge["kept"] == merge["kept_in_working_type"] == pytest.approx(kept_of(engine, folder), abs=1e-3)
    assert f"merged in float32 and stored in {stored}, which keeps {merge['kept']:.2%}" in caplog.text
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {getattr(torch, stored)}


def test_a_model_without_adapters_has_nothing_merged(base, tmp_path):
    engine = engine_of(base, size=0.1, rank=0)
    assert export_model(engine, tmp_path / "model", tokenizer=load_tokenizer(str(base))) is None
