"""Tokenised rows on disk, found again by what they were made of: rows, tokenizer, settings.

One Arrow file each, `KEY.CHECKSUM.arrow`, written under a temporary name and renamed, so that it is complete or absent
and several ranks may write the same one. Nothing is pickled and nothing is ever out of date; old files can be deleted
at any time.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import feather

from rlhf.runtime.atomic_files import writing
from rlhf.text.tokenizer import Row, Tokens

LAYOUT = 3  # raise it when a row comes to be tokenised, or stored, differently


def content_key(rows: Iterable[Row], settings: Iterable[str]) -> str:
    """Hash of the content of `rows` and of everything in `settings` that decides how they are tokenised."""
    digest = hashlib.sha256(json.dumps([LAYOUT, *settings]).encode())
    for row in rows:
        digest.update(json.dumps(sorted(row.items()), default=str).encode())  # inside, templates see the order of keys
    return digest.hexdigest()


def cached(folder: str | None, key: str, *, make: Callable[[], list[list[Tokens]]]) -> list[list[Tokens]]:
    """The tokens of each row stored in `folder` under `key`, else those that `make` makes, stored for the next time.

    Args:
        folder: `data.cache_dir`; None makes them every time.
        key: From `content_key`.
        make: Called where nothing is stored.
    """
    if folder is None:
        return make()
    stored = sorted(Path(folder).glob(f"{key}.*.arrow"))
    return _read(stored[0] if stored else _write(Path(folder), key, rows=make()))


def _write(folder: Path, key: str, *, rows: list[list[Tokens]]) -> Path:
    tokens = [sequence for row in rows for sequence in row]
    ends = np.cumsum([0, *(len(sequence.input_ids) for sequence in tokens)])
    flat = {
        "input_ids": np.concatenate([sequence.input_ids for sequence in tokens]),
        "target_mask": np.concatenate([sequence.target_mask for sequence in tokens]),
    }
    columns = {name: pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values)) for name, values in flat.items()}
    columns |= {
        "num_prompt": pa.array([sequence.num_prompt for sequence in tokens]),
        "rewritten": pa.array([sequence.rewritten for sequence in tokens], pa.list_(pa.int32())),
        "row": pa.array([number for number, row in enumerate(rows) for _ in row]),
    }
    arrow = pa.BufferOutputStream()
    feather.write_feather(pa.table(columns), arrow)
    content = arrow.getvalue()
    file, unfinished = folder / f"{key}.{_checksum(content)}.arrow", folder / f"{key}.{uuid.uuid4().hex}.unfinished"
    with writing(file):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(content)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)
    return file


def _read(file: Path) -> list[list[Tokens]]:
    content = pa.py_buffer(file.read_bytes())
    if file.name.split(".")[-2] != _checksum(content):
        raise ValueError(f"data.cache_dir: {file} is damaged (its checksum differs); delete it.")
    table = feather.read_table(pa.BufferReader(content)).combine_chunks()
    ids, masks = (_sequences(table.column(name)) for name in ("input_ids", "target_mask"))
    numbers, turns, owners = (table.column(name).to_pylist() for name in ("num_prompt", "rewritten", "row"))
    rows: list[list[Tokens]] = [[] for _ in range(owners[-1] + 1)]
    for owner, *parts, rewritten in zip(owners, ids, masks, numbers, turns, strict=True):
        rows[owner].append(Tokens(*parts, tuple(rewritten)))
    return rows


def _checksum(content: pa.Buffer) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _sequences(column: pa.ChunkedArray) -> list[np.ndarray]:
    lists = column.combine_chunks()
    values = lists.values.to_numpy(zero_copy_only=False)
    return np.split(values, lists.offsets.to_numpy()[1:-1])
