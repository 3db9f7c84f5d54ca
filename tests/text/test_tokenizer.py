"""Loading a tokenizer, its pad and stop tokens, decoding and fingerprints."""

import json
import logging

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from rlhf.text.tokenize_rows import tokenize_demonstration, tokenize_prompt
from rlhf.text.tokenizer import decode, load_tokenizer, stop_token_ids, template_fingerprint, tokenizer_fingerprint
from tests import fakes

USER = {"role": "user", "content": "hello"}
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def with_template(tmp_path, template):
    return load_tokenizer(str(fakes.chat_tokenizer(tmp_path / "other", chat_template=template)))


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    folder = fakes.byte_level_tokenizer(tmp_path, special_tokens=["<pad>"], pad_token="<pad>")
    with pytest.raises(ValueError, match="no EOS token"):
        load_tokenizer(str(folder))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: found no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_template_file_replaces_the_template(tmp_path):
    file = tmp_path / "plain.jinja"
    file.write_text(PLAIN_TEMPLATE)
    tokenizer = load_tokenizer(str(fakes.chat_tokenizer(tmp_path / "chat")), chat_template=str(file))
    assert tokenizer.decode(tokenize_prompt(tokenizer, {"prompt": [USER]})) == "user: hello\nassistant: "


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ messages | nonsense }}", "{{ 1 + none }}"])
def test_a_template_that_does_not_render_is_refused(tmp_path, template):
    file = tmp_path / "broken.jinja"
    file.write_text(template)
    with pytest.raises(ValueError, match=r"model.chat_template=.*broken.jinja: cannot render"):
        load_tokenizer(str(fakes.chat_tokenizer(tmp_path / "chat")), chat_template=str(file))


def test_a_template_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="model.chat_template=nowhere.jinja: no such file"):
        load_tokenizer(str(fakes.chat_tokenizer(tmp_path)), chat_template="nowhere.jinja")


# ---- the end of a response, decoding, fingerprints


def test_stop_tokens_are_eos_the_models_list_and_the_end_of_a_turn(chat):
    end = chat.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(chat) == (chat.eos_token_id, end)
    assert stop_token_ids(chat, GenerationConfig(eos_token_id=[7, end])) == (chat.eos_token_id, 7, end)
    assert stop_token_ids(chat, GenerationConfig(eos_token_id=7)) == (chat.eos_token_id, 7, end)


def test_without_a_template_only_the_eos_stops(bare, gpt):
    assert stop_token_ids(bare) == (bare.eos_token_id,)
    assert stop_token_ids(gpt, GenerationConfig()) == (gpt.eos_token_id,)


def test_decoding_removes_special_tokens_and_keeps_spaces(gpt):
    assert decode(gpt, [*gpt.encode("it 's  bad ."), gpt.eos_token_id, gpt.pad_token_id]) == "it 's  bad ."


def test_the_fingerprint_changes_with_template_pad_and_vocabulary(tmp_path):
    folder = str(fakes.chat_tokenizer(tmp_path / "a"))
    base = load_tokenizer(folder)
    other_template = with_template(tmp_path, PLAIN_TEMPLATE)
    other_pad = load_tokenizer(folder, pad_token="<|endoftext|>")
    assert template_fingerprint(load_tokenizer(folder)) == template_fingerprint(base)
    assert len({template_fingerprint(t) for t in (base, other_template, other_pad)}) == 3
    smaller = load_tokenizer(
        str(
            fakes.byte_level_tokenizer(
                tmp_path / "b", special_tokens=["</s>", "<pad>"], eos_token="</s>", pad_token="<pad>", vocab_size=300
            )
        )
    )
    renamed = load_tokenizer(
        str(
            fakes.byte_level_tokenizer(
                tmp_path / "c", special_tokens=["<end>", "<pad>"], eos_token="<end>", pad_token="<pad>", vocab_size=300
            )
        )
    )
    assert template_fingerprint(smaller) == template_fingerprint(renamed)
    assert tokenizer_fingerprint(smaller) != tokenizer_fingerprint(renamed)


# ---- the token to pad with, found without a larger vocabulary


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
