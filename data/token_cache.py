"""Stores tokenised rows on disk under a key made of all that decides their tokens: rows, tokenizer, settings.

There is one Arrow file per key, `KEY.CHECKSUM.arrow`, with a row per sequence. It is complete or absent, so several
ranks may write the same one, and it is never out of date. Old files can be deleted at any time. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from data.rows import KNOWN_COLUMNS, BadRow
from rlhf.runtime.atomic_files import write_bytes
from rlhf.text.chat_template import Row
from rlhf.text.tokenize_rows import TokenSequence

FORMAT = 5
"""Raise it when rows come to be tokenised, or stored, differently."""

RowTokens = list[TokenSequence]


def content_key(rows: Iterable[Row | BadRow], settings: Iterable[str]) -> str:
    """Hash of `rows` and of everything in `settings` that decides how they are tokenised."""
    digest = hashlib.sha256(json.dumps([FORMAT, *settings]).encode())
    for row in rows:
        # Columns in any order, but not the keys inside a value: templates write those in their order.
        content = (
            row.reason if isinstance(row, BadRow) else [(name, row[name]) for name in KNOWN_COLUMNS if name in row]
        )
        digest.update(json.dumps(content, default=str).encode())
    return digest.hexdigest()


def cached(
    folder: str | None, key: str, *, make: Callable[[], Sequence[RowTokens | BadRow]]
) -> Sequence[RowTokens | BadRow]:
    """The tokens of each row stored in `folder` under `key`; else those from `make`, stored unless a row is bad.

    Without a `folder` (`data.cache_dir`) they are made every time.
    """
    stored = sorted(Path(folder).glob(f"{key}.*.arrow")) if folder is not None else []
    if stored:
        return _read(stored[0])
    made = make()
    good = [row for row in made if not isinstance(row, BadRow)]
    if folder is not None and len(good) == len(made):
        _write(Path(folder), key, rows=good)
    return made


def _write(folder: Path, key: str, *, rows: Sequence[RowTokens]) -> None:
    import pyarrow as pa  # slow to import, and runs without a cache do not need it
    from pyarrow import feather

    owned = [(number, sequence) for number, row in enumerate(rows) for sequence in row]
    columns = {
        "input_ids": pa.array([tokens.input_ids for _, tokens in owned], pa.large_list(pa.int32())),
        "target_mask": pa.array([tokens.target_mask for _, tokens in owned], pa.large_list(pa.bool_())),
        "num_prompt": pa.array([tokens.num_prompt for _, tokens in owned]),
        "rewritten": pa.array([tokens.rewritten for _, tokens in owned], pa.list_(pa.int32())),
        "row": pa.array([number for number, _ in owned]),
    }
    arrow = pa.BufferOutputStream()
    feather.write_feather(pa.table(columns), arrow)
    content = arrow.getvalue()
    write_bytes(folder / f"{key}.{_checksum(content)}.arrow", memoryview(content))


def _read(file: Path) -> list[RowTokens]:
    import pyarrow as pa
    from pyarrow import feather

    content = pa.py_buffer(file.read_bytes())
    if file.name.split(".")[-2] != _checksum(content):
        raise ValueError(f"data.cache_dir: {file} is damaged (its checksum differs); delete it.")
    table = feather.read_table(pa.BufferReader(content))
    ids, masks = (table.column(name).to_numpy() for name in ("input_ids", "target_mask"))
    others = (table.column(name).to_pylist() for name in ("num_prompt", "rewritten", "row"))
    rows: dict[int, RowTokens] = {}
    for input_ids, target_mask, num_prompt, rewritten, row in zip(ids, masks, *others, strict=True):
        rows.setdefault(row, []).append(TokenSequence(input_ids, target_mask, num_prompt, tuple(rewritten)))
    return [*rows.values()]


def _checksum(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
