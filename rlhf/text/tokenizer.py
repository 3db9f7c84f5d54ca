"""Loads a tokenizer that has what training needs, decodes, and tells which tokens end a response.

[Note: padding] The pad token must differ from the EOS. Inside the project it would not matter, because every mask
comes from lengths; but an exported `AutoModelForSequenceClassification` reads its score at the last token that is
not padding, and would skip an EOS that looks like it. No token is added, so no model is resized.

See also: `tokenize_rows.py` (rows to tokens).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers.models import BPE
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.runtime.errors import load_auto
from rlhf.text.chat_template import after_answer, turn_end

logger = logging.getLogger(__name__)

Tokenizer = PreTrainedTokenizerBase

PAD_LIKE = (
    *("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|fim_pad|>", "<|vision_pad|>"),
    *("<|extra_0|>", "<|reserved_special_token_0|>", "<|endoftext|>"),
)
BYTES_NEVER_IN_UTF8 = (*range(0xFF, 0xF4, -1), 0xC1, 0xC0)
LAST_BYTE = "<0xFF>"
NEW_PAD = "<|pad|>"


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
    _set_pad_token(tokenizer, pad_token, path=path)
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


# ---- the pad token


def _set_pad_token(tokenizer: Tokenizer, asked: str | None, *, path: str) -> None:
    """Give the tokenizer a pad token of its vocabulary. See [Note: padding].

    It is the token asked for; else the tokenizer's own; else one declared for such use; else one for a byte that UTF-8
    never contains.
    """
    size = len(tokenizer)
    if asked is not None and asked not in tokenizer.get_vocab():
        raise ValueError(
            f"model.pad_token={asked}: not among the {size} tokens of {path}, and a new token would need a larger "
            "model; name one of them, or null to let one be found."
        )
    pad = asked or _declared_pad(tokenizer) or _unreachable_token(tokenizer)
    if pad is None:
        raise ValueError(f"{path}: found no token to pad with; set model.pad_token to one that no text has.")
    tokenizer.add_special_tokens({"pad_token": pad})
    assert len(tokenizer) == size, f"padding with {pad} made the vocabulary grow from {size} to {len(tokenizer)}"
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        logger.warning("model.pad_token=%s is the EOS: an exported reward model scores the token before it.", pad)


def _declared_pad(tokenizer: Tokenizer) -> str | None:
    taken = {tokenizer.bos_token_id, *stop_token_ids(tokenizer)}
    if tokenizer.pad_token is not None and tokenizer.pad_token_id not in taken:
        return str(tokenizer.pad_token)
    declared = tokenizer.added_tokens_encoder
    return next((token for token in PAD_LIKE if token in declared and declared[token] not in taken), None)


def _unreachable_token(tokenizer: Tokenizer) -> str | None:
    """The token of a byte that UTF-8 never contains, so that no text is ever encoded to it."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return LAST_BYTE if LAST_BYTE in tokenizer.get_vocab() else None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"].get("byte_fallback") and LAST_BYTE in tokenizer.get_vocab():
        return LAST_BYTE
    byte_level = '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["normalizer"]])
    return _renamed_byte(tokenizer, state["model"]) if byte_level and state["model"]["type"] == "BPE" else None


def _renamed_byte(tokenizer: PreTrainedTokenizerFast, model: dict[str, Any]) -> str | None:
    """Rename the token of an impossible byte to NEW_PAD, which keeps its id, and return that name.

    A byte-level vocabulary writes byte 0xFF as the letter y with diaeresis. Declared as the pad token under that
    name, saved and loaded again, it would turn the letter in any text into padding; hence the new name.
    """
    vocabulary = model["vocab"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    merged = {symbol for merge in merges for symbol in merge}
    free = [chr(byte) for byte in BYTES_NEVER_IN_UTF8 if chr(byte) in vocabulary and chr(byte) not in merged]
    if not free or NEW_PAD in vocabulary:
        return None
    renamed = {NEW_PAD if token == free[0] else token: index for token, index in vocabulary.items()}
    rest = {key: value for key, value in model.items() if key not in ("type", "vocab", "merges") and value is not None}
    tokenizer.backend_tokenizer.model = BPE(vocab=renamed, merges=merges, **rest)
    return NEW_PAD
