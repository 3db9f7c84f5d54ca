"""Streamed pieces add up to the decoded text, and none ends inside a character."""

from functools import partial

import pytest

from rlhf.chat.chat_model import TextStream
from rlhf.text.tokenizer import decode, load_tokenizer
from tests.fakes import byte_fallback_tokenizer, chat_tokenizer

TEXTS = [
    "the movie is great and the film is bad\n\n  indented, twice  ",
    "ÄÖÜ ßé 日本語の文章 🙂 👨‍👩‍👧 a",
    "x" * 200 + " 🙂 " + "日" * 60 + " end",
]


@pytest.fixture(scope="module", params=[chat_tokenizer, byte_fallback_tokenizer], ids=["byte level", "byte fallback"])
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(str(request.param(tmp_path_factory.mktemp("tokenizer"))))


def streamed(tokenizer, ids):
    stream = TextStream(partial(decode, tokenizer))
    pieces = [stream.add(token) for token in ids] + [stream.rest()]
    assert stream.text == "".join(pieces)
    return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_and_hold_whole_characters(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == decode(tokenizer, ids)
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > len(text) / 4, "it should stream, not wait for the end"


def test_a_cut_character_shows_as_a_replacement_at_the_end(tokenizer):
    ids = tokenizer("a🙂", add_special_tokens=False).input_ids[:-1]
    pieces = streamed(tokenizer, ids)
    assert "\ufffd" not in "".join(pieces[:-1])
    assert "".join(pieces) == decode(tokenizer, ids)
    assert pieces[-1].startswith("\ufffd")


def test_bytes_that_are_no_text_do_not_hold_up_what_follows(tokenizer):
    smile = tokenizer("🙂", add_special_tokens=False).input_ids
    letter = tokenizer("x", add_special_tokens=False).input_ids
    ids = [smile[-1]] * 100 + letter
    pieces = streamed(tokenizer, ids)
    assert sum(map(len, pieces[:50])) >= 40
    assert "".join(pieces) == decode(tokenizer, ids)


def test_the_cost_of_a_token_does_not_grow_with_the_text(tokenizer):
    sizes = []

    def counted(ids):
        sizes.append(len(ids))
        return decode(tokenizer, ids)

    stream = TextStream(counted)
    for token in tokenizer(TEXTS[2] + TEXTS[1], add_special_tokens=False).input_ids:
        stream.add(token)
    assert max(sizes) < 50


def test_special_tokens_show_nothing(tokenizer):
    ids = [*tokenizer("a b", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert "".join(streamed(tokenizer, ids)) == decode(tokenizer, ids)
    assert streamed(tokenizer, ids)[-2:] == ["", ""]
