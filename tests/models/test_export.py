"""Exports: what plain transformers and PEFT load is what we had, written a tensor at a time."""

import errno
import json
import os
import weakref

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from rlhf.config.stage_configs import LoraConfig
from rlhf.models.causal_lm import causal_lm, position_ids
from rlhf.models.export import Entry, SafetensorsFile, export
from rlhf.models.scalar_head import last_token_scores, scalar_head_model
from rlhf.runtime.errors import RunError
from tests.models import tiny

IDS, MASK = tiny.padded([5, 9, 7], side="left")
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "position_ids": position_ids(MASK)}


def write(module, folder, **settings):
    export(module, tiny.named_tensors(module), folder=folder, tokenizer=tiny.tokenizer(), **settings)
    return folder


def logits(model):
    with torch.no_grad():
        return model(**INPUTS).logits


def with_adapters(make, folder, **settings):
    module = tiny.materialized(make(folder, lora=LoraConfig(rank=3, alpha=6.0), **settings))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.2)
    return module


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_transformers_loads_the_same_language_model(family, tmp_path):
    module = tiny.materialized(causal_lm(tiny.save(family, tmp_path / "base"), dropout=0.3))
    with torch.no_grad():
        next(iter(module.parameters())).add_(0.5)
    loaded, report = AutoModelForCausalLM.from_pretrained(write(module, tmp_path / "out"), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(logits(loaded.eval()), logits(module))
    base = json.loads((tmp_path / "base/config.json").read_text())
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: base[name] for name in base if "drop" in name} == {
        name: written[name] for name in written if "drop" in name
    }
    assert written["architectures"] == base["architectures"]


def test_a_mixture_of_experts_survives_the_trip(tmp_path):
    module = tiny.materialized(causal_lm(tiny.moe(tmp_path / "base")))
    loaded = AutoModelForCausalLM.from_pretrained(write(module, tmp_path / "out")).eval()
    assert torch.equal(logits(loaded), logits(module))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "opt", "gemma3"])
def test_with_adapters_the_folder_holds_the_merged_model(family, tmp_path):
    module = with_adapters(causal_lm, tiny.save(family, tmp_path / "base"))
    loaded = AutoModelForCausalLM.from_pretrained(write(module, tmp_path / "out")).eval()
    assert torch.allclose(logits(loaded), logits(module), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "opt", "gemma3"])
def test_peft_loads_the_adapter_on_the_base(family, tmp_path):
    base = tiny.save(family, tmp_path / "base")
    module = with_adapters(causal_lm, base)
    write(module, tmp_path / "out")
    assert json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain.eval())
    loaded = PeftModel.from_pretrained(plain, tmp_path / "out/adapter").eval()
    assert torch.allclose(logits(loaded), logits(module), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before, logits(module), atol=1e-2)


def test_an_adapter_on_the_top_layers_loads_too(tmp_path):
    base = tiny.save("llama", tmp_path / "base")
    module = tiny.materialized(
        causal_lm(base, lora=LoraConfig(rank=3, top_layers=1, targets=["q_proj", "mlp.up_proj"]))
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    write(module, tmp_path / "out")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out/adapter").eval()
    assert torch.allclose(logits(loaded), logits(module), rtol=1e-5, atol=1e-6)
    assert len(load_file(tmp_path / "out/adapter/adapter_model.safetensors")) == 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_reward_models_adapter_brings_its_head(family, tmp_path):
    base = tiny.save(family, tmp_path / "base")
    module = with_adapters(scalar_head_model, base, seed=9)
    out = write(module, tmp_path / "out")
    with torch.no_grad():
        scores = last_token_scores(module(IDS, MASK, position_ids=position_ids(MASK)), MASK)
        whole = AutoModelForSequenceClassification.from_pretrained(out, num_labels=1).eval()
        assert torch.allclose(whole(**INPUTS).logits[:, 0], scores, rtol=1e-4, atol=1e-5)
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=tiny.PAD)
        adapted = PeftModel.from_pretrained(plain, out / "adapter").eval()
        assert torch.allclose(adapted(**INPUTS).logits[:, 0], scores, rtol=1e-4, atol=1e-5)


def test_a_model_without_adapters_has_no_adapter_folder(tmp_path):
    module = tiny.materialized(scalar_head_model(tiny.save("llama", tmp_path / "base")))
    assert not (write(module, tmp_path / "out") / "adapter").exists()


def test_shards_are_bounded_and_indexed(tmp_path):
    module = tiny.materialized(causal_lm(tiny.save("llama", tmp_path / "base")))
    out = write(module, tmp_path / "out", max_shard_bytes=40_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 40_000 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(dict(module.named_parameters()))
    assert index["metadata"]["total_size"] == sum(p.numel() for p in module.parameters()) * 4
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out).eval()), logits(module))


@pytest.mark.parametrize("adapted", [False, True])
def test_one_layer_and_the_adapters_are_all_that_is_held(adapted, tmp_path):
    base = tiny.save("llama", tmp_path / "base")
    module = with_adapters(causal_lm, base) if adapted else tiny.materialized(causal_lm(base))
    sizes = {name: parameter.nbytes for name, parameter in module.named_parameters()}
    alive: list[weakref.ref[Tensor]] = []
    held = []

    def stream():
        for name, parameter in module.named_parameters():
            held.append(sum(tensor.nbytes for ref in alive if (tensor := ref()) is not None))
            tensor = parameter.detach().clone()
            alive.append(weakref.ref(tensor))
            yield name, tensor

    export(module, stream(), folder=tmp_path / "out", tokenizer=tiny.tokenizer())
    adapters = sum(size for name, size in sizes.items() if ".lora_" in name)
    assert max(held) <= adapters + max(sizes.values()) < 0.5 * sum(sizes.values())


def test_tensors_of_several_types_and_sizes_are_read_back_from_one_file(tmp_path):
    values = {
        "odd": torch.randn(3, 5).bfloat16(),
        "flag": torch.tensor([True, False, True]),
        "counts": torch.arange(7),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "wide": torch.randn(4, 6).T,
    }
    file = SafetensorsFile(tmp_path / "some", [Entry(name, t.shape, t.dtype) for name, t in values.items()])
    for name in reversed(values):
        file.write(name, values[name])
    file.close()
    found = load_file(tmp_path / "some")
    assert found.keys() == values.keys()
    for name, tensor in values.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_tied_weights_are_written_once(tmp_path):
    module = tiny.materialized(causal_lm(tiny.save("llama_tied", tmp_path / "base")))
    tensors = load_file(write(module, tmp_path / "out") / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings


def test_the_type_can_be_chosen_and_the_configuration_says_it(tmp_path):
    module = tiny.materialized(causal_lm(tiny.save("llama", tmp_path / "base")))
    out = write(module, tmp_path / "out", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_tokenizer_template_and_generation_settings_come_along(tmp_path):
    base = tiny.save("llama", tmp_path / "base")
    GenerationConfig(eos_token_id=[7, tiny.EOS], temperature=0.6, do_sample=True).save_pretrained(base)
    out = write(tiny.materialized(causal_lm(base)), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token_id == tiny.PAD
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w1 w2"}], tokenize=False) == "w1 w2 <eos> "
    settings = GenerationConfig.from_pretrained(out)
    assert (settings.eos_token_id, settings.pad_token_id, settings.temperature) == ([7, tiny.EOS], tiny.PAD, 0.6)


@pytest.mark.parametrize(
    ("own", "template", "expected"),
    [
        (None, "{{ messages[0]['content'] }}", tiny.EOS),
        (7, "{% for m in messages %}{{ m['content'] }}<pad>{% endfor %}", [7, tiny.EOS, tiny.PAD]),
        (7, "{{ raise_exception('no answers') }}", [7, tiny.EOS]),
    ],
    ids=["eos", "turn end", "template that does not render"],
)
def test_plain_generation_stops_where_responses_ended_here(own, template, expected, tmp_path):
    base = tiny.save("llama", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": own}))
    module = tiny.materialized(causal_lm(base))
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    export(module, tiny.named_tensors(module), folder=tmp_path / "out", tokenizer=tokenizer)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == expected


def test_generation_settings_that_transformers_would_not_save_are_kept(tmp_path):
    base = tiny.save("llama", tmp_path / "base")
    (base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 7, "temperature": 0.6, "do_sample": False})
    )
    out = write(tiny.materialized(causal_lm(base)), tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6


def test_nothing_is_pickled(tmp_path):
    out = write(with_adapters(causal_lm, tiny.save("llama", tmp_path / "base")), tmp_path / "out")
    suffixes = {file.suffix for file in out.rglob("*") if file.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".md"}


def test_an_interrupted_export_leaves_the_old_folder_alone(tmp_path):
    module = tiny.materialized(causal_lm(tiny.save("llama", tmp_path / "base")))
    out = write(module, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()

    def torn():
        yield from list(tiny.named_tensors(module))[:5]
        raise KeyboardInterrupt

    with torch.no_grad():
        next(module.parameters()).add_(1)
    with pytest.raises(KeyboardInterrupt):
        export(module, torn(), folder=out, tokenizer=tiny.tokenizer())
    assert (out / "model.safetensors").read_bytes() == before
    write(module, out)
    assert (out / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("where", ["pwrite", "tokenizer", "config"])
def test_a_full_disk_is_said_and_leaves_the_old_folder_alone(tmp_path, monkeypatch, where):
    module = tiny.materialized(causal_lm(tiny.save("llama", tmp_path / "base")))
    out = write(module, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    error = OSError(errno.ENOSPC, "No space left on device")

    def full(*_, **__):
        # The library behind tokenizers has a class of its own for what the system says.
        raise Exception(f"{error.strerror} (os error {error.errno})") if where == "tokenizer" else error

    owner, name = {
        "pwrite": (os, "pwrite"),
        "tokenizer": (PreTrainedTokenizerBase, "save_pretrained"),
        "config": (PreTrainedConfig, "save_pretrained"),
    }[where]
    monkeypatch.setattr(owner, name, full)
    with torch.no_grad():
        next(module.parameters()).add_(1)
    with pytest.raises(RunError, match=rf"{out} cannot be written: No space left on device\. Make room"):
        write(module, out)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_a_stream_that_lacks_a_parameter_is_not_published(tmp_path):
    module = tiny.materialized(causal_lm(tiny.save("llama", tmp_path / "base")))
    stream = (item for item in tiny.named_tensors(module) if item[0] != "model.norm.weight")
    with pytest.raises(AssertionError, match=r"never arrived: \['model\.norm\.weight'\]"):
        export(module, stream, folder=tmp_path / "out", tokenizer=tiny.tokenizer())
    assert not (tmp_path / "out").exists()


def test_a_rank_that_does_not_write_still_takes_every_tensor(tmp_path):
    module = tiny.materialized(causal_lm(tiny.save("llama", tmp_path / "base")))
    stream = tiny.named_tensors(module)
    export(module, stream, folder=tmp_path / "out", tokenizer=tiny.tokenizer(), write=False)
    assert next(stream, None) is None
    assert not (tmp_path / "out").exists()
