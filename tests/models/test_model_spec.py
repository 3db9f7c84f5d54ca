"""What counts as a model that can be trained, its modules without memory, and the changes that every family takes."""

import json

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    Gemma3Config,
    Gemma3TextConfig,
    MptConfig,
    PreTrainedConfig,
    T5Config,
    ViTConfig,
)

from rlhf.config.stage_configs import LoraConfig
from rlhf.models import model_spec
from rlhf.models.causal_lm import causal_lm, position_ids
from rlhf.models.model_spec import (
    decoder_config,
    dropout_settings,
    enable_activation_checkpointing,
    find_blocks,
    first_layers,
    with_dropout,
)
from rlhf.models.scalar_head import scalar_head_model
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


def ids_and_mask():
    ids, mask = tiny.padded([6, 9], side="left")
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_dropout_reaches_every_place_and_zero_removes_it(family, tmp_path):
    tiny.save(family, tmp_path)
    with torch.no_grad():
        plain = tiny.materialized(causal_lm(tmp_path)).train()
        assert torch.equal(plain(**ids_and_mask()).logits, plain(**ids_and_mask()).logits)
        dropping = tiny.materialized(causal_lm(tmp_path, dropout=0.5)).train()
        assert not torch.allclose(dropping(**ids_and_mask()).logits, dropping(**ids_and_mask()).logits)
    assert all(child.p == 0.5 for child in dropping.modules() if isinstance(child, nn.Dropout))
    probabilities = {
        value for child in dropping.modules() for name, value in vars(child).items() if name.endswith("dropout")
    }
    assert {value for value in probabilities if isinstance(value, float)} <= {0.5}


def test_opt_never_skips_layers_and_every_probability_of_its_config_is_set():
    config = tiny.FAMILIES["opt"]()
    config.layerdrop, config.dropout, config.attention_dropout = 0.7, 0.1, 0.2
    changed = with_dropout(config, 0.3)
    assert (changed.layerdrop, changed.dropout, changed.attention_dropout) == (0.0, 0.3, 0.3)
    assert (config.layerdrop, config.dropout) == (0.7, 0.1)


def test_gpt2_has_four_dropouts():
    changed = with_dropout(tiny.FAMILIES["gpt2"](), 0.3)
    assert {changed.attn_pdrop, changed.embd_pdrop, changed.resid_pdrop, changed.summary_first_dropout} == {0.3}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_shorter_trunk_gives_the_hidden_states_of_its_last_layer(family, tmp_path):
    tiny.save(family, tmp_path)
    spec = scalar_head_model(tmp_path, num_layers=2)
    assert len(spec.blocks) == 2
    assert spec.config.num_hidden_layers == 2
    whole = AutoModel.from_pretrained(tmp_path).eval()
    *_, block = find_blocks(whole, 3)[:2]
    seen = []
    hook = block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    trunk = tiny.materialized(spec).get_submodule(spec.module._trunk_name)
    hook_short = spec.blocks[-1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        whole(**ids_and_mask())
        trunk(**ids_and_mask())
    hook.remove()
    hook_short.remove()
    assert torch.equal(*seen)


def test_lists_with_an_entry_for_each_layer_are_cut_with_them():
    shorter = first_layers(tiny.FAMILIES["gemma3"](), 2)
    assert shorter.layer_types == ["sliding_attention", "full_attention"]
    assert first_layers(tiny.FAMILIES["gpt2"](), 1).n_layer == 1
    assert first_layers(tiny.FAMILIES["gpt2"](), 0).n_layer == 3


@pytest.mark.parametrize("count", [-1, 4])
def test_more_layers_than_there_are_is_an_error(count):
    with pytest.raises(ValueError, match=f"num_layers={count}: expected 0 .all. to 3"):
        first_layers(tiny.FAMILIES["llama"](), count)


def test_blocks_are_the_outermost_list_of_their_length():
    inner = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    outer = nn.ModuleList([nn.ModuleDict({"experts": inner}), nn.Identity()])
    module = nn.ModuleDict({"trunk": nn.ModuleDict({"h": outer})})
    assert find_blocks(module, 2) == list(outer)
    with pytest.raises(ValueError, match="found no list of 3 blocks"):
        find_blocks(module, 3)


def count_forwards(block):
    calls = []
    norm = next(child for child in block.modules() if "Norm" in type(child).__name__)
    norm.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("make", [causal_lm, scalar_head_model])
def test_recomputed_activations_give_the_same_gradients_from_more_forwards(family, make, tmp_path):
    tiny.save(family, tmp_path)
    plain, recomputing = (tiny.materialized(make(tmp_path)).train() for _ in range(2))
    enable_activation_checkpointing(recomputing)
    calls = count_forwards(find_blocks(recomputing, 3)[1])
    for module in (plain, recomputing):
        output = module(**ids_and_mask())
        (output if make is scalar_head_model else output.logits).square().sum().backward()
    assert len(calls) == 2
    for (name, a), b in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6), name


def test_frozen_layers_below_the_adapters_are_not_recomputed(tmp_path):
    tiny.save("llama", tmp_path)
    spec = causal_lm(tmp_path, lora=LoraConfig(rank=2, top_layers=1))
    module = tiny.materialized(spec).train()
    enable_activation_checkpointing(module)
    below, above = (count_forwards(block) for block in spec.blocks[1:])
    module(**ids_and_mask()).logits.square().sum().backward()
    assert (len(below), len(above)) == (1, 2)
    assert module.get_submodule("model.layers.2.mlp.up_proj.lora_B.default").weight.grad.abs().sum() > 0


def test_a_module_that_cannot_recompute_says_so():
    with pytest.raises(ValueError, match="engine.activation_checkpointing=false"):
        enable_activation_checkpointing(nn.Linear(2, 2))


def test_with_offload_nothing_but_the_inputs_of_blocks_is_moved_to_the_host(tmp_path, monkeypatch):
    tiny.save("llama", tmp_path)
    plain, offloading = (tiny.materialized(causal_lm(tmp_path)).train() for _ in range(2))
    moved = []

    def recorded(*, pin_memory):
        return saved_tensors_hooks(lambda tensor: moved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor)

    monkeypatch.setattr(model_spec, "save_on_cpu", recorded)
    enable_activation_checkpointing(plain)
    enable_activation_checkpointing(offloading, offload=True)
    for module in (plain, offloading):
        module(**ids_and_mask()).logits.square().sum().backward()
    hidden = (*ids_and_mask()["input_ids"].shape, offloading.config.hidden_size)
    assert moved.count(hidden) == len(find_blocks(offloading, 3))
    moved = [shape for shape in moved if shape != (0,)]  # older PyTorch keeps an empty tensor for each block
    assert all(shape[:2] in {hidden[:2], (1, hidden[1])} or len(shape) == 4 for shape in moved), moved
    for (name, a), b in zip(plain.named_parameters(), offloading.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def logits(module, *, training):
    torch.manual_seed(0)
    with torch.no_grad():
        return module.train(training)(input_ids=torch.arange(20)[None]).logits


def dropping_everywhere(family, folder):
    """A model whose configuration, and those inside it, drop in every place that they know."""
    config = with_dropout(tiny.FAMILIES[family](), 0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("reached", ["by settings", "in the built model", "nowhere"])
def test_training_mode_computes_what_evaluation_does_though_the_folder_drops(family, reached, tmp_path, monkeypatch):
    folder = dropping_everywhere(family, tmp_path)
    if reached != "by settings":  # as for a probability that no setting gives
        monkeypatch.setattr("rlhf.models.causal_lm.with_dropout", lambda config, probability: config)
    if reached == "nowhere":
        monkeypatch.setattr("rlhf.models.model_spec.set_dropout", lambda module, probability: {})
    spec = causal_lm(folder)
    assert 0.1 in spec.found_dropout.values()
    module = tiny.materialized(spec)
    same = torch.equal(logits(module, training=True), logits(module, training=False))
    assert same == (reached != "nowhere")


def test_dropout_of_a_nested_configuration_is_named_in_full(tmp_path):
    config = tiny.FAMILIES["llama"]()
    config.inner = PreTrainedConfig()
    config.inner.attn_pdrop = 0.2
    assert dropout_settings(config) == {"attention_dropout": 0.0, "inner.attn_pdrop": 0.2}
    assert with_dropout(config, 0.0).inner.attn_pdrop == 0
    assert config.inner.attn_pdrop == 0.2
    AutoModelForCausalLM.from_config(MptConfig(d_model=32, n_heads=4, n_layers=3)).save_pretrained(tmp_path)
    assert causal_lm(tmp_path).found_dropout == {}  # its nested one is a whole number
