"""The token to pad with, found without a larger vocabulary."""

import json
import logging

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from rlhf.text.tokenize_rows import (
    tokenize_demonstration,
)
from rlhf.text.tokenizer import decode, load_tokenizer, template_fingerprint
from tests import fakes


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_a_pad_token_of_its_own_is_kept(chat):
    assert (chat.pad_token, chat.eos_token) == ("<|pad|>", "<|endoftext|>")


def test_a_pad_token_that_is_the_eos_is_replaced_by_one_that_no_text_contains(tmp_path):
    folder = fakes.pad_is_eos_tokenizer(tmp_path / "gpt")
    before = AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    texts = ["ÿ", "L'Haÿ ÷ À", "the movie is great", "".join(map(chr, range(32, 1000))), "電影 🎬"]
    assert tokenizer.pad_token_id == before.convert_tokens_to_ids("ÿ")  # the symbol of byte 0xFF
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert len(tokenizer) == len(before)
    for text in texts:
        assert ids(tokenizer, text) == ids(before, text)
        assert tokenizer.pad_token_id not in ids(tokenizer, text)
        assert decode(tokenizer, ids(tokenizer, text)) == text


def test_a_pad_token_that_was_found_survives_saving(gpt, tmp_path):
    gpt.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (again.pad_token_id, len(again)) == (gpt.pad_token_id, len(gpt))
    assert ids(again, "L'Haÿ") == ids(gpt, "L'Haÿ")
    assert template_fingerprint(again) == template_fingerprint(gpt)
    assert load_tokenizer(str(tmp_path / "saved")).pad_token_id == gpt.pad_token_id


@pytest.mark.parametrize("kind", [GPT2Tokenizer, Qwen2Tokenizer])
def test_tokenizers_with_a_class_of_their_own_find_one_too(tmp_path, kind):
    folder = fakes.pad_is_eos_tokenizer(tmp_path / "gpt")
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    before = kind(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    before.save_pretrained(tmp_path / "before")
    load_tokenizer(str(tmp_path / "before")).save_pretrained(tmp_path / "after")
    after = AutoTokenizer.from_pretrained(tmp_path / "after")
    assert isinstance(after, kind)
    assert (after.pad_token_id, len(after)) == (before.convert_tokens_to_ids("ÿ"), len(before))
    assert ids(after, "ÿ the movie") == ids(before, "ÿ the movie")


def test_a_byte_that_has_become_part_of_merges_is_passed_over(tmp_path):
    folder = fakes.pad_is_eos_tokenizer(tmp_path / "gpt")
    file = folder / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    text = backend.to_str()
    size = backend.get_vocab_size()
    text = text.replace('"vocab": {', f'"vocab": {{"ÿÿ": {size}, ').replace('"merges": [', '"merges": [["ÿ", "ÿ"], ')
    text = text.replace('"vocab":{', f'"vocab":{{"ÿÿ":{size},').replace('"merges":[', '"merges":[["ÿ","ÿ"],')
    file.write_text(text, encoding="utf-8")
    before = AutoTokenizer.from_pretrained(folder)
    assert "ÿÿ" in before.get_vocab()
    assert load_tokenizer(str(folder)).pad_token_id == before.convert_tokens_to_ids("þ")  # byte 0xFE


def test_a_declared_token_that_nothing_else_uses_becomes_the_pad_token(tmp_path):
    folder = fakes.byte_level_tokenizer(
        tmp_path,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=fakes.CHAT_TEMPLATE,
    )
    assert load_tokenizer(str(folder)).pad_token == "<|endoftext|>"


def test_the_end_of_a_turn_is_not_taken_for_padding(tmp_path):
    template = fakes.CHAT_TEMPLATE.replace("<|im_end|>", "<pad>")
    folder = fakes.byte_level_tokenizer(
        tmp_path,
        special_tokens=["</s>", "<pad>", "[PAD]"],
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=template,
    )
    assert load_tokenizer(str(folder)).pad_token == "[PAD]"


def test_a_vocabulary_with_byte_fallback_pads_with_the_last_byte(tmp_path):
    tokenizer = load_tokenizer(str(fakes.byte_fallback_tokenizer(tmp_path)))
    assert tokenizer.pad_token_id == 3 + 0xFF
    assert tokenizer.pad_token_id not in ids(tokenizer, "abc ÿ ÷ é 電")


def test_without_any_safe_token_the_error_names_the_setting(tmp_path):
    backend = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "film": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.pad_token"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tmp_path), pad_token="<unk>").pad_token_id == 1


def test_a_pad_token_outside_the_vocabulary_is_refused(tmp_path):
    folder = str(fakes.bare_tokenizer(tmp_path))
    with pytest.raises(ValueError, match=r"model.pad_token=\[PAD\]: not among the \d+ tokens"):
        load_tokenizer(folder, pad_token="[PAD]")


def test_the_eos_as_pad_token_is_allowed_when_asked_for_and_still_learnt(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(str(fakes.bare_tokenizer(tmp_path)), pad_token="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "is the EOS" in caplog.text
    tokens = tokenize_demonstration(tokenizer, {"prompt": "a film", "completion": " is bad"}, response_only=True)
    assert tokens.input_ids[-1] == tokenizer.eos_token_id
    assert tokens.target_mask[-1]
