"""Loading a tokenizer, its stop tokens, decoding and fingerprints."""

import pytest
from transformers import GenerationConfig

from rlhf.text.tokenize_rows import (
    tokenize_prompt,
)
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
