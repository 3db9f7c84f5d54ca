"""Tokenizers for the tests of this folder."""

import pytest

from rlhf.text.tokenizer import load_tokenizer
from tests import fakes


@pytest.fixture
def chat(tmp_path):
    return load_tokenizer(str(fakes.chat_tokenizer(tmp_path / "chat")))


@pytest.fixture
def gpt(tmp_path):
    return load_tokenizer(str(fakes.pad_is_eos_tokenizer(tmp_path / "gpt")))


@pytest.fixture
def bare(tmp_path):
    return load_tokenizer(str(fakes.bare_tokenizer(tmp_path / "bare")))
