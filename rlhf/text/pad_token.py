"""Finds a token to pad with, without making the vocabulary larger.

[Note: padding] The pad token must differ from the EOS. Inside the project it would not matter, because every mask
comes from lengths; but an exported `AutoModelForSequenceClassification` reads its score at the last token that is
not padding, and would skip an EOS that looks like it. No token is added, so no model is resized.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from typing import Any

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

PAD_LIKE = (
    *("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|fim_pad|>", "<|vision_pad|>"),
    *("<|extra_0|>", "<|reserved_special_token_0|>", "<|endoftext|>"),
)
BYTES_NEVER_IN_UTF8 = (*range(0xFF, 0xF4, -1), 0xC1, 0xC0)
LAST_BYTE = "<0xFF>"
NEW_PAD = "<|pad|>"


def set_pad_token(
    tokenizer: PreTrainedTokenizerBase, asked: str | None, *, taken: Collection[int | None], path: str
) -> None:
    """Give the tokenizer a pad token of its vocabulary. See [Note: padding].

    It is the token asked for; else the tokenizer's own; else one declared for such use; else one for a byte that UTF-8
    never contains.

    Args:
        tokenizer: Changed in place; keeps its size.
        asked: `model.pad_token`.
        taken: Ids that mean something else: BOS and stop tokens.
        path: Where the tokenizer is, for messages.
    """
    size = len(tokenizer)
    if asked is not None and asked not in tokenizer.get_vocab():
        raise ValueError(
            f"model.pad_token={asked}: not among the {size} tokens of {path}, and a new token would need a larger "
            "model; name one of them, or null to let one be found."
        )
    pad = asked or _declared(tokenizer, taken) or _unreachable(tokenizer)
    if pad is None:
        raise ValueError(f"{path}: found no token to pad with; set model.pad_token to one that no text has.")
    tokenizer.add_special_tokens({"pad_token": pad})
    assert len(tokenizer) == size, f"padding with {pad} made the vocabulary grow from {size} to {len(tokenizer)}"
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        logger.warning("model.pad_token=%s is the EOS: an exported reward model scores the token before it.", pad)


def _declared(tokenizer: PreTrainedTokenizerBase, taken: Collection[int | None]) -> str | None:
    if tokenizer.pad_token is not None and tokenizer.pad_token_id not in taken:
        return str(tokenizer.pad_token)
    declared = tokenizer.added_tokens_encoder
    return next((token for token in PAD_LIKE if token in declared and declared[token] not in taken), None)


def _unreachable(tokenizer: PreTrainedTokenizerBase) -> str | None:
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
