"""Adapters: where they go, what they change, and that the base never does."""

import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config.stage_configs import LoraConfig
from rlhf.models.causal_lm import causal_lm, position_ids
from rlhf.models.lora import MergePrecision, adapted_layers, adapters_off, inject, merge_adapters
from rlhf.models.scalar_head import scalar_head_model
from tests.models import tiny

LINEAR_PER_BLOCK = {"llama": 7, "qwen3": 7, "mistral": 7, "gemma2": 7, "gemma3": 7, "gpt2": 4, "opt": 6}


class Adapted(NamedTuple):
    module: nn.Module
    base: nn.Module


def adapted(family, folder, *, dtype=torch.float32, alpha=6.0, dropout=0.0):
    """A model whose adapters all matter, and the plain model below it."""
    tiny.save(family, folder)
    module = tiny.materialized(
        causal_lm(folder, lora=LoraConfig(rank=3, alpha=alpha, dropout=dropout)), dtype=torch.float32
    )
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.2)
            elif ".lora_" not in name:
                parameter.data = parameter.data.to(dtype)
    return Adapted(module, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


def logits(module, seed=0):
    ids, mask = tiny.padded([5, 9, 7], side="left", seed=seed)
    with torch.no_grad():
        return module(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits[mask]


@pytest.mark.parametrize("family", LINEAR_PER_BLOCK)
def test_all_linear_means_every_linear_layer_but_the_head(family, tmp_path):
    spec = causal_lm(tiny.save(family, tmp_path), lora=LoraConfig(rank=3))
    layers = adapted_layers(spec.module)
    assert len(layers) == 3 * LINEAR_PER_BLOCK[family]
    assert not any("head" in name for name in layers)
    assert len(spec.trainable) == 2 * len(layers)
    learning = {name for name, parameter in spec.module.named_parameters() if parameter.requires_grad}
    assert learning == spec.trainable
    assert all(parameter.is_meta for parameter in spec.module.parameters())


@pytest.mark.parametrize("family", LINEAR_PER_BLOCK)
def test_a_fresh_adapter_changes_nothing(family, tmp_path):
    tiny.save(family, tmp_path)
    module = tiny.materialized(causal_lm(tmp_path, lora=LoraConfig(rank=3)))
    assert torch.equal(logits(module), logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()))


def test_an_adapter_adds_alpha_over_rank_times_its_product(tmp_path):
    module = adapted("llama", tmp_path).module
    layer = module.model.layers[1].mlp.up_proj
    x = torch.randn(4, 32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.base_layer.weight.T + 6.0 / 3 * (x @ a.T) @ b.T
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_first_values_are_uniform_within_one_over_the_root_of_the_inputs(tmp_path):
    spec = causal_lm(tiny.save("llama", tmp_path), lora=LoraConfig(rank=8))
    a = spec.weights.read("model.layers.0.mlp.down_proj.lora_A.default.weight", slice(None))
    bound = 1 / math.sqrt(48)
    assert a.shape == (8, 48)
    assert 0.9 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not spec.weights.read("model.layers.0.mlp.down_proj.lora_B.default.weight", slice(None)).any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_top_layers_get_adapters_when_asked(family, tmp_path):
    tiny.save(family, tmp_path)
    layers = adapted_layers(causal_lm(tmp_path, lora=LoraConfig(rank=3, top_layers=2)).module)
    assert {next(part for part in name.split(".") if part.isdigit()) for name in layers} == {"1", "2"}
    assert len(layers) == 2 * LINEAR_PER_BLOCK[family]
    with pytest.raises(ValueError, match=r"lora.top_layers=4: expected 0 .all. to 3"):
        causal_lm(tmp_path, lora=LoraConfig(rank=3, top_layers=4))


def test_targets_are_names_or_ends_of_names(tmp_path):
    tiny.save("llama", tmp_path)
    lora = LoraConfig(rank=3, targets=["q_proj", "mlp.down_proj"], top_layers=1)
    assert set(adapted_layers(causal_lm(tmp_path, lora=lora).module)) == {
        "model.layers.2.self_attn.q_proj",
        "model.layers.2.mlp.down_proj",
    }


def test_a_target_that_names_nothing_lists_what_there_is(tmp_path):
    tiny.save("llama", tmp_path)
    with pytest.raises(ValueError, match=r"lora.targets.*\['c_attn'\] names no linear layer.*all-linear.*'q_proj'"):
        causal_lm(tmp_path, lora=LoraConfig(rank=3, targets=["q_proj", "c_attn"]))


def test_a_scalar_head_is_not_adapted_but_learns(tmp_path):
    spec = scalar_head_model(tiny.save("gpt2", tmp_path), lora=LoraConfig(rank=3))
    assert not any("score" in name for name in adapted_layers(spec.module))
    assert "score.weight" in spec.trainable
    assert len(spec.trainable) == 3 * 4 * 2 + 1


@pytest.mark.parametrize("family", LINEAR_PER_BLOCK)
def test_with_adapters_off_the_model_is_its_base(family, tmp_path):
    module, base = adapted(family, tmp_path)
    with_adapters = logits(module)
    before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    with adapters_off(module):
        assert torch.equal(logits(module), logits(base))
    assert torch.equal(logits(module), with_adapters)
    assert not torch.allclose(with_adapters, logits(base), atol=1e-2)
    assert before == {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def test_there_are_no_adapters_to_switch_off_in_a_plain_model(tmp_path):
    module = tiny.materialized(causal_lm(tiny.save("llama", tmp_path)))
    with pytest.raises(AssertionError, match="no adapters"), adapters_off(module):
        pass


def change_of(layer):
    """scale * B A of a layer, as its weight lies, in fp64."""
    product = (
        layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    return product.T if layer.fan_in_fan_out else product


@pytest.mark.parametrize("family", LINEAR_PER_BLOCK)
def test_adapters_compute_what_the_sum_of_the_weights_does(family, tmp_path):
    module, base = adapted(family, tmp_path)
    found = logits(module)
    assert not torch.allclose(found, logits(base), atol=0.1)
    with torch.no_grad():
        for name, layer in adapted_layers(module).items():
            base.get_submodule(name).weight += change_of(layer)
    assert torch.allclose(found, logits(base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e-4, 5e-4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_what_is_small_beside_the_last_bit_of_a_weight_is_not_lost(family, size, tmp_path):
    lora = LoraConfig(rank=3, alpha=3.0)
    module = tiny.materialized(causal_lm(tiny.save(family, tmp_path), lora=lora), dtype=torch.bfloat16)
    layer = next(iter(adapted_layers(module).values()))
    torch.manual_seed(0)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(0, size)
        if layer.base_layer.bias is not None:
            layer.base_layer.bias.normal_(0, 0.1)
        x = torch.randn(1 << 16, 32).bfloat16()
        found, plain = layer(x).double(), layer.base_layer(x).double()
        weight, change = layer.base_layer.weight.double(), change_of(layer)
        exact = x.double() @ (change if layer.fan_in_fan_out else change.T)
    # Rounding is up to 5 times what is looked for: over 2 million numbers, it moves the share by some 0.005.
    assert along(found - plain, exact) == pytest.approx(1, abs=0.03)
    assert along((weight + change).bfloat16().double() - weight, change) < 0.9, "merged weights lose some of it"


def along(found, exact):
    return ((found * exact).sum() / exact.square().sum()).item()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_merging_needs_no_order_and_gives_the_merged_weights(family, tmp_path):
    module = adapted(family, tmp_path).module
    stream = list(tiny.named_tensors(module))
    expected = {
        name.replace(".base_layer.", "."): parameter.detach().clone()
        for name, parameter in module.named_parameters()
        if ".lora_" not in name
    }
    for name, layer in adapted_layers(module).items():
        expected[f"{name}.weight"] += change_of(layer)
    for order in (stream, stream[::-1]):
        merged = dict(merge_adapters(iter(order), adapted_layers(module)))
        assert merged.keys() == expected.keys()
        assert all(torch.allclose(merged[name], expected[name], rtol=1e-6, atol=1e-7) for name in expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_rounding_leaves_of_the_change_is_measured(family, tmp_path):
    module = adapted(family, tmp_path, dtype=torch.bfloat16).module
    with torch.no_grad():
        for layer in adapted_layers(module).values():
            layer.lora_B["default"].weight.normal_(0, 1e-3)
    layers = adapted_layers(module)
    for dtype in (torch.bfloat16, torch.float32):
        precision = MergePrecision()
        merged = dict(merge_adapters(tiny.named_tensors(module), layers, dtype=dtype, precision=precision))
        stored, change = (
            torch.cat([part.flatten() for part in parts])
            for parts in (
                [merged[f"{name}.weight"].double() - layer.base_layer.weight for name, layer in layers.items()],
                [change_of(layer) for layer in layers.values()],
            )
        )
        assert all(merged[f"{name}.weight"].dtype is dtype for name in layers)
        assert precision.share == pytest.approx(along(stored, change), rel=1e-5)
    assert precision.share == pytest.approx(1, abs=1e-4)
    fresh = MergePrecision()
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"].weight.zero_()
    list(merge_adapters(tiny.named_tensors(module), layers, precision=fresh))
    assert fresh.share == 1.0, "there is nothing to lose"


def test_merging_holds_one_layer_at_a_time(tmp_path):
    module = adapted("llama", tmp_path).module
    arrived = []

    def stream():
        for name, tensor in tiny.named_tensors(module):
            arrived.append(name)
            yield name, tensor

    for name, _ in merge_adapters(stream(), adapted_layers(module)):
        layer = name.rpartition(".")[0]
        assert arrived[-1].startswith(layer), f"{name} was held back until {arrived[-1]}"


def test_a_tensor_that_never_arrives_is_noticed(tmp_path):
    module = adapted("llama", tmp_path).module
    stream = [
        item for item in tiny.named_tensors(module) if item[0] != "model.layers.1.mlp.up_proj.lora_B.default.weight"
    ]
    with pytest.raises(AssertionError, match=r"never arrived.*layers\.1\.mlp\.up_proj"):
        list(merge_adapters(stream, adapted_layers(module)))


def test_dropout_of_adapters_acts_in_training_only(tmp_path):
    module = adapted("llama", tmp_path, dropout=0.5).module
    assert torch.equal(logits(module), logits(module))
    module.train()
    assert not torch.allclose(logits(module), logits(module))


def test_adapters_hold_the_only_gradients(tmp_path):
    module = adapted("gpt2", tmp_path).module.train()
    ids, mask = tiny.padded([5, 9], side="right")
    module(input_ids=ids, attention_mask=mask).logits.square().mean().backward()
    with_gradient = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in module.named_parameters() if ".lora_" in name}


def test_rank_zero_is_no_adapter(tmp_path):
    spec = causal_lm(tiny.save("llama", tmp_path), lora=LoraConfig(rank=0))
    assert not adapted_layers(spec.module)
    assert spec.trainable == {name for name, _ in spec.module.named_parameters()}
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_bias_too_an_adapter_that_adds_nothing_changes_no_bit(dtype):
    layer = nn.ModuleDict({"score": nn.Identity(), "linear": nn.Linear(64, 48, dtype=dtype)})
    inject(layer, LoraConfig(rank=3), blocks=[layer["linear"]])
    adapter = layer["linear"]
    for name, parameter in adapter.named_parameters():
        if ".lora_" in name or name.startswith("lora_"):
            values = torch.zeros if "lora_B" in name else torch.randn
            module, _, leaf = name.rpartition(".")
            setattr(adapter.get_submodule(module), leaf, nn.Parameter(values(parameter.shape, dtype=dtype)))
    x = torch.randn(5, 7, 64).to(dtype)
    with torch.no_grad():
        found = adapter(x)
        with adapters_off(layer):
            assert torch.equal(found, adapter(x))
        assert adapter(x[:0]).shape == (0, 7, 48)


def test_a_run_without_adapters_does_not_import_peft(tmp_path):
    tiny.save("llama", tmp_path)
    program = (
        "import sys, stages.pipeline; from rlhf.models.causal_lm import causal_lm; "
        "from rlhf.config.stage_configs import LoraConfig; "
        f"causal_lm({str(tmp_path)!r}); print('peft' in sys.modules); "
        f"causal_lm({str(tmp_path)!r}, lora=LoraConfig(rank=2)); print('peft' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True)
    assert found.stdout.split() == ["False", "True"]
