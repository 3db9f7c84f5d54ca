"""What counts as a model that can be trained, and its modules without memory."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    Gemma3Config,
    Gemma3TextConfig,
    T5Config,
    ViTConfig,
)

from rlhf.models.causal_lm import causal_lm
from rlhf.models.meta_init import decoder_config
from tests.models import tiny


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (T5Config(), "an encoder with a decoder"),
        (BartConfig(), "an encoder with a decoder"),
        (BertConfig(), "not a decoder"),
        (ViTConfig(), "not a decoder"),
        (Gemma3Config(text_config=Gemma3TextConfig(**tiny._SHAPE).to_dict()), "reads more than text"),
    ],
)
def test_anything_but_a_decoder_of_text_is_refused_by_its_config_alone(config, complaint, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{config.model_type}.*{complaint}"):
        causal_lm(tmp_path)


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_quantised_weights_are_refused(tmp_path):
    tiny.save("llama", tmp_path)
    edited(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantised and cannot be trained"):
        decoder_config(tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    tiny.save("llama", tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    edited(tmp_path, model_type="homemade", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(ValueError, match="cannot read its `config.json`"):
        decoder_config(tmp_path)


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="no model: it has no `config.json`"):
        causal_lm(tmp_path)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parameters_are_on_meta_and_buffers_are_those_of_a_loaded_model(family, tmp_path):
    module = causal_lm(tiny.save(family, tmp_path)).module
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in module.parameters())
    assert {name for name, _ in module.named_buffers()} == set(loaded)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, loaded[name]), name


def test_a_token_learns_even_if_it_also_pads(tmp_path):
    module = tiny.materialized(causal_lm(tiny.save("llama", tmp_path)))
    module(torch.tensor([[5, tiny.PAD, 7]])).logits.square().sum().backward()
    learns = module.model.embed_tokens.weight.grad.abs().sum(-1) > 0
    assert learns.nonzero().flatten().tolist() == [5, 7, tiny.PAD]


def test_tied_weights_stay_tied(tmp_path):
    module = causal_lm(tiny.save("llama_tied", tmp_path)).module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(module.named_parameters())
