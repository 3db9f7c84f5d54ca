"""Stores tokenised rows on disk under a key made of all that decides their tokens: rows, tokenizer, settings.

One safetensors file per key, `KEY.CHECKSUM.safetensors`. It is written under a temporary name and renamed, so it is
complete or absent and several ranks may write the same one. Nothing is pickled and nothing is ever out of date; old
files can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeGuard

import numpy as np
from safetensors.numpy import load, save

from data.rows import BadRow
from rlhf.runtime.atomic_files import writing
from rlhf.text.chat_template import Row
from rlhf.text.tokenize_rows import TokenSequence

FORMAT = 4
"""Raise it when rows come to be tokenised, or stored, differently."""

RowTokens = list[TokenSequence]


def content_key(rows: Iterable[Row | BadRow], settings: Iterable[str]) -> str:
    """Hash of `rows` and of everything in `settings` that decides how they are tokenised."""
    digest = hashlib.sha256(json.dumps([FORMAT, *settings]).encode())
    for row in rows:
        # Columns in any order, but not the keys inside a value: templates write those in their order.
        content = row.reason if isinstance(row, BadRow) else sorted(row.items())
        digest.update(json.dumps(content, default=str).encode())
    return digest.hexdigest()


def cached(
    folder: str | None, key: str, *, make: Callable[[], Sequence[RowTokens | BadRow]]
) -> Sequence[RowTokens | BadRow]:
    """The tokens of each row stored in `folder` under `key`; else those from `make`, stored unless a row is bad.

    Args:
        folder: `data.cache_dir`; None makes them every time.
        key: From `content_key`.
        make: Called if nothing is stored.
    """
    stored = sorted(Path(folder).glob(f"{key}.*.safetensors")) if folder is not None else []
    if stored:
        return _read(stored[0])
    made = make()
    if folder is not None and _all_good(made):
        _write(Path(folder), key, rows=made)
    return made


def _all_good(rows: Sequence[RowTokens | BadRow]) -> TypeGuard[Sequence[RowTokens]]:
    return not any(isinstance(row, BadRow) for row in rows)


def _write(folder: Path, key: str, *, rows: Sequence[RowTokens]) -> None:
    sequences = [sequence for row in rows for sequence in row]
    content = save(
        {
            "input_ids": np.concatenate([sequence.input_ids for sequence in sequences]),
            "target_mask": np.concatenate([sequence.target_mask for sequence in sequences]),
            "rewritten": np.array([turn for sequence in sequences for turn in sequence.rewritten], dtype=np.int64),
            "num_prompt": np.array([sequence.num_prompt for sequence in sequences]),
            "length": np.array([len(sequence.input_ids) for sequence in sequences]),
            "num_rewritten": np.array([len(sequence.rewritten) for sequence in sequences]),
            "sequences_of_row": np.array([len(row) for row in rows]),
        }
    )
    file, unfinished = folder / f"{key}.{_checksum(content)}.safetensors", folder / f"{key}.{uuid.uuid4().hex}.tmp"
    with writing(file):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(content)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)


def _read(file: Path) -> list[RowTokens]:
    content = file.read_bytes()
    if file.name.split(".")[-2] != _checksum(content):
        raise ValueError(f"data.cache_dir: {file} is damaged (its checksum differs); delete it.")
    arrays = load(content)
    ids, masks = (np.split(arrays[name], np.cumsum(arrays["length"])[:-1]) for name in ("input_ids", "target_mask"))
    rewritten = np.split(arrays["rewritten"], np.cumsum(arrays["num_rewritten"])[:-1])
    parts = zip(ids, masks, arrays["num_prompt"].tolist(), rewritten, strict=True)
    sequences = (TokenSequence(ids, mask, num_prompt, tuple(turns.tolist())) for ids, mask, num_prompt, turns in parts)
    return [[*islice(sequences, count)] for count in arrays["sequences_of_row"].tolist()]


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
