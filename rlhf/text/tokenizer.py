"""Loads a tokenizer, certain to have what training needs; decodes; tells which tokens end a response.

See also: `pad_token.py` (the token to pad with), `tokenize_rows.py` (rows to tokens).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.runtime.errors import load_auto
from rlhf.text.chat_template import after_answer, turn_end
from rlhf.text.pad_token import set_pad_token

Tokenizer = PreTrainedTokenizerBase


def load_tokenizer(path: str, *, chat_template: str | None = None, pad_token: str | None = None) -> Tokenizer:
    """The tokenizer at `path`, certain to have an EOS and a pad token, with the vocabulary size it came with.

    Args:
        path: Folder or hub id (`model.path`).
        chat_template: Jinja file that replaces the tokenizer's own template (`model.chat_template`).
        pad_token: Token to pad with (`model.pad_token`); None looks for one. See [Note: padding].
    """
    folder = str(Path(path).expanduser()) if str(path).startswith("~") else path
    complaint = f"{path}: found no tokenizer there that loads:"
    tokenizer: Tokenizer = load_auto(AutoTokenizer, folder, complaint=complaint)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no EOS token; name one as `eos_token` in its config.")
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise ValueError(f"model.chat_template={chat_template}: no such file; expected a Jinja chat template.")
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        after_answer(tokenizer, tokenizer.chat_template, name=f"model.chat_template={chat_template}")
    set_pad_token(tokenizer, pad_token, taken={tokenizer.bos_token_id, *stop_token_ids(tokenizer)}, path=path)
    return tokenizer


def template_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of chat template, special token ids and vocabulary size: what two stages must agree on."""
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    facts = json.dumps([tokenizer.chat_template, ids, len(tokenizer)], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of all that decides how a row is tokenised: `template_fingerprint` and the whole vocabulary."""
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    vocabulary = tokenizer.backend_tokenizer.to_str() if fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256((template_fingerprint(tokenizer) + vocabulary).encode()).hexdigest()


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of `ids`, special tokens removed and spaces left alone."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def stop_token_ids(tokenizer: Tokenizer, generation_config: GenerationConfig | None = None) -> tuple[int, ...]:
    """Tokens that end a response: the EOS, the model's own list, and the end of a turn in the chat template."""
    listed = generation_config.eos_token_id if generation_config is not None else None
    ids = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    if tokenizer.chat_template is not None:
        end_of_turn = turn_end(tokenizer, tokenizer.get_chat_template())
        ids.append(tokenizer.convert_tokens_to_ids(end_of_turn) if end_of_turn else None)
    return tuple(dict.fromkeys(token for token in ids if token is not None))
