"""Values of parameters, row by row, under whatever names a checkpoint has."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf.config.stage_configs import LoraConfig
from rlhf.models.causal_lm import causal_lm
from rlhf.models.model_folder import ModelFolder
from rlhf.models.scalar_head import scalar_head_model
from tests.models import tiny


def in_parts(spec, name, ranks):
    """The parameter as `ranks` ranks read it, joined."""
    rows = dict(spec.module.named_parameters())[name].shape[0]
    share = -(-rows // ranks)
    cuts = [slice(min(rank * share, rows), min((rank + 1) * share, rows)) for rank in range(ranks)]
    return torch.cat([spec.weights.read(name, cut) for cut in cuts])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_rows_of_three_ranks_are_the_model_that_transformers_loads(family, tmp_path):
    tiny.model(family).save_pretrained(tmp_path, max_shard_size="20KB")
    expected = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    spec = causal_lm(tmp_path)
    names = [name for name, _ in spec.module.named_parameters()]
    assert names == list(expected)
    for name in names:
        assert torch.equal(in_parts(spec, name, 3), expected[name]), name


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "opt"])
def test_a_checkpoint_of_the_bare_trunk_fills_a_tied_language_model(family, tmp_path, caplog):
    whole = tiny.model(family)
    whole.base_model.save_pretrained(tmp_path)
    assert not any(key.startswith(f"{whole.base_model_prefix}.") for key in ModelFolder(tmp_path).keys())  # noqa: SIM118
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        spec = causal_lm(tmp_path)
    assert not caplog.text  # it was not loaded whole
    for name, expected in whole.named_parameters():
        assert torch.equal(spec.weights.read(name, slice(None)), expected), name


def test_an_embedding_that_is_stored_under_the_heads_name_is_found(tmp_path):
    tiny.save("llama_tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    read = causal_lm(tmp_path).weights.read("model.embed_tokens.weight", slice(3, 5))
    assert torch.equal(read, tensors["lm_head.weight"][3:5])


def test_a_mixture_of_experts_is_loaded_whole_and_says_so(tmp_path, caplog):
    tiny.moe(tmp_path)
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        spec = causal_lm(tmp_path)
    assert "every process reads the whole model" in caplog.text
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(tiny.materialized(spec)(ids).logits, reference(ids).logits)


def test_other_models_are_not_loaded_whole(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        causal_lm(tiny.save("qwen3", tmp_path))
    assert not caplog.text


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_new_parameters_are_the_same_for_every_number_of_ranks(ranks, tmp_path):
    spec = scalar_head_model(tiny.save("llama", tmp_path), lora=LoraConfig(rank=3), seed=5)
    assert len(spec.trainable) == 3 * 7 * 2 + 1
    for name in spec.trainable:
        assert torch.equal(in_parts(spec, name, ranks), in_parts(spec, name, 1))


def test_new_parameters_depend_on_the_seed_and_the_name_and_nothing_else(tmp_path):
    tiny.save("llama", tmp_path)
    path = "model.layers.{}.self_attn.q_proj.lora_A.default.weight"

    def read(number, *, seed, rank=3, targets="all-linear"):
        spec = causal_lm(tmp_path, lora=LoraConfig(rank=rank, targets=[targets]), seed=seed)
        return spec.weights.read(path.format(number), slice(None))

    torch.manual_seed(1)
    first = read(0, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, read(0, seed=5, targets="q_proj"))
    assert not torch.equal(first, read(0, seed=6))
    assert not torch.equal(first, read(1, seed=5))


def test_a_missing_tensor_is_named(tmp_path):
    tiny.save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 parameters.*model\.layers\.1\.mlp\.up_proj\.weight"):
        causal_lm(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    tiny.save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(130, 32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight.*\(130, 32\).*\(128, 32\)"):
        causal_lm(tmp_path)
