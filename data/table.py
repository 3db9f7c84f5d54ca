"""The rows of a data set, each as it stands in its file."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from data.rows import BrokenRow
from data.split import Indices
from rlhf.text.tokenizer import Row

Block = list[Row] | pa.RecordBatch | datasets.Dataset


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are wanted, and what they are called here."""

    renamed: dict[str, str]
    """Our name -> the file's, where they differ."""
    wanted: Collection[str] | None = None
    """Our names; None wants all."""

    def called(self, theirs: str) -> str | None:
        """Our name of a column; None where another column takes its place."""
        ours = next((ours for ours, name in self.renamed.items() if name == theirs), theirs)
        return None if ours == theirs and self.renamed.get(ours, theirs) != theirs else ours

    def kept(self, found: Sequence[str]) -> dict[str, str]:
        """The file's name -> ours, of the wanted columns; raises ValueError where one of them is there twice."""
        names = {theirs: ours for theirs in found if (ours := self.called(theirs)) is not None}
        kept = {theirs: ours for theirs, ours in names.items() if self.wanted is None or ours in self.wanted}
        twice = [theirs for theirs in kept if list(found).count(theirs) > 1]
        if twice:
            raise ValueError(f"found columns {[*found]}; {twice} is there more than once, expected each name once.")
        return kept


@dataclass(frozen=True)
class Part:
    """Rows that follow each other in one file, under our names."""

    file: str
    first: int  # number in the file of the first row
    rows: Block


@dataclass(frozen=True)
class Rows:
    """All rows of a source, in order; they are converted when they are taken."""

    columns: list[str]
    """Those that are there, whether they are wanted or not."""
    parts: list[Part]

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    def take(self, numbers: Indices) -> list[Row]:
        """The rows of these numbers, which ascend; those that cannot be read are `BrokenRow`s."""
        return [row for part, own in self._by_part(numbers) for row in _converted(part.rows, own)]

    def places(self, numbers: Indices) -> list[str]:
        """Where each of these rows stands, for people: its number, and its file where there are several."""
        several = len({part.file for part in self.parts}) > 1
        return [
            f"{part.first + number}{f' of {part.file}' * several}"
            for part, own in self._by_part(numbers)
            for number in own.tolist()
        ]

    def _by_part(self, numbers: Indices) -> list[tuple[Part, Indices]]:
        ends = np.cumsum([len(part.rows) for part in self.parts])
        cuts = np.split(numbers, np.searchsorted(numbers, ends))
        starts = [0, *ends.tolist()]
        return [(part, own - start) for part, own, start in zip(self.parts, cuts, starts, strict=False) if len(own)]


def joined(files: Sequence[Rows]) -> Rows:
    """The rows of several files, one after the other; a column may be missing in some."""
    columns = dict.fromkeys(name for file in files for name in file.columns)
    return Rows([*columns], [part for file in files for part in file.parts])


def _converted(rows: Block, numbers: Indices) -> list[Row]:
    if isinstance(rows, list):
        return [rows[number] for number in numbers.tolist()]
    if isinstance(rows, datasets.Dataset):
        batches = rows.with_format("arrow")[numbers.tolist()].to_batches()
        return [row for batch in batches for row in _of_batch(batch)]
    return _of_batch(rows.take(pa.array(numbers)))


def _of_batch(batch: pa.RecordBatch) -> list[Row]:
    return [_of_columns(batch, number) for number in range(batch.num_rows)]


def _of_columns(batch: pa.RecordBatch, number: int) -> Row:
    row = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        try:
            row[field.name] = as_written(column[number].as_py(), field.type)
        except (ValueError, RecursionError) as error:
            return BrokenRow(problem=f"`{field.name}` cannot be read: {error}")
    return row


def as_written(value: Any, kind: pa.DataType) -> Any:
    """A value of an Arrow column as it was before Arrow gave all rows one schema.

    A mapping has the keys of all rows there, null where the row has none. Whether such a null was written cannot be
    told any more, so all are left out; those in lists, maps and JSON columns, which do not come from merging, stay.
    """
    if value is None:
        return None
    if pa.types.is_struct(kind):
        return {part.name: as_written(value[part.name], part.type) for part in kind if value[part.name] is not None}
    if pa.types.is_map(kind):
        return {key: as_written(item, kind.item_type) for key, item in value}
    if isinstance(value, list):
        return [as_written(item, kind.value_type) for item in value]
    return json.loads(value) if str(kind) == "extension<arrow.json>" else value
