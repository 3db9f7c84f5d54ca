"""Reads one file of rows: JSON, JSON lines, CSV or Parquet.

Each row keeps the keys, types and nulls that it has in the file: rows are not merged into one schema. A row that cannot
be read becomes a `BadRow` with the reason, in its place. Columns that nobody wants are dropped before their values are
looked at. Every field of a CSV stays text. Nothing is unpickled.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from data.rows import BadRow, ColumnSelection, FileRows, shortened
from rlhf.text.chat_template import Row

if TYPE_CHECKING:
    import pyarrow as pa  # slow to import, so only the functions that read Arrow do so

READABLE = (".json", ".jsonl", ".csv", ".parquet")
MAX_NESTING = 100
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)
GIT_LFS = b"version https://git-lfs"
LIST_START, LIST_NEXT = re.compile(r"\s*\[\s*(\])?"), re.compile(r"\s*(?:,|(\]))\s*")


class _HugeInteger:
    """Stands in for a number with more digits than Python converts."""


def _integer(digits: str) -> int | _HugeInteger:
    limit = sys.get_int_max_str_digits()
    return _HugeInteger() if limit and len(digits) > limit else int(digits)


DECODER = json.JSONDecoder(parse_int=_integer)


def _open_zstd(path: Path, mode: str, **text: Any) -> TextIO:
    import pyarrow as pa

    return io.TextIOWrapper(pa.input_stream(str(path), compression="zstd"), **text)


COMPRESSED: Mapping[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
"""How a compressed file is opened, by the last part of its name."""


def file_type(path: Path) -> str:
    """The suffix without that of a compressed file, in lower case."""
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix.lower()


def read_file(path: Path, columns: ColumnSelection) -> FileRows:
    """The rows of a file; ValueError if the file as a whole cannot be read."""
    if file_type(path) not in READABLE:
        raise ValueError(f"data source {path}: found a {path.suffix or 'nameless'} file; expected one of {READABLE}.")
    try:
        with path.open("rb") as file:
            if file.read(len(GIT_LFS)) == GIT_LFS:
                raise ValueError("found a Git LFS pointer instead of the data; run `git lfs pull` in its folder.")
        if file_type(path) == ".parquet":
            return _read_parquet(path, columns)
        with _opened(path) as stream:
            return (_read_csv if file_type(path) == ".csv" else _read_json)(stream, columns, file=path.name)
    except OSError as error:
        raise ValueError(f"data source {path}: cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"data source {path}: {error}") from error


def _opened(path: Path) -> TextIO:
    """The text of a file; bytes that are not UTF-8 become halves of characters, see `_problem`."""
    opened = partial(COMPRESSED.get(path.suffix, Path.open), path)
    newline = "" if file_type(path) == ".csv" else "\n"
    return cast(TextIO, opened(mode="rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline))


# ---- Parquet and other Arrow tables


def _read_parquet(path: Path, columns: ColumnSelection) -> FileRows:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        found = file.schema_arrow.names
        return arrow_rows(file.read(columns=[*columns.kept(found)]), columns, file=path.name, found=found)
    except pa.ArrowException as error:
        raise ValueError(f"cannot be read: {error}") from error


def arrow_rows(table: pa.Table, columns: ColumnSelection, *, file: str, found: Sequence[str]) -> FileRows:
    """The rows of an Arrow table that has at least those of the `found` columns that are selected."""
    kept = columns.kept(found)
    return FileRows(file, found, _ArrowRows(table.select([*kept]).rename_columns([*kept.values()])))


class _ArrowRows(Sequence[Row | BadRow]):
    """Converts a row to Python when it is asked for; the table may be much larger than memory."""

    def __init__(self, table: pa.Table) -> None:
        self._num_rows = int(table.num_rows)
        self._columns = [*zip(table.schema, table.columns, strict=True)]

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self._num_rows:  # a table without columns would not complain
            raise IndexError(number)
        row: dict[str, Any] = {}
        for field, column in self._columns:
            try:
                row[field.name] = without_added_nulls(column[number].as_py(), field.type)
            except (ValueError, RecursionError) as error:
                return BadRow(f"`{field.name}` cannot be read: {error}")
        return row


def without_added_nulls(value: Any, kind: pa.DataType) -> Any:
    """A value of an Arrow column as it was before Arrow gave all rows one schema.

    Arrow gives each mapping the keys of all rows, with null for those that the row lacks. Nulls that were in the row
    look the same, so all are left out. Nulls in lists, maps and JSON columns do not come from merging, and stay.
    """
    from pyarrow import types

    if value is None:
        return None
    if types.is_struct(kind):
        present = [part for part in kind if value[part.name] is not None]
        return {part.name: without_added_nulls(value[part.name], part.type) for part in present}
    if types.is_map(kind):
        return {key: without_added_nulls(item, kind.item_type) for key, item in value}
    if isinstance(value, list):
        return [without_added_nulls(item, kind.value_type) for item in value]
    return json.loads(value) if str(kind) == "extension<arrow.json>" else value


# ---- CSV


def _read_csv(stream: TextIO, columns: ColumnSelection, *, file: str) -> FileRows:
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(stream, strict=True)
    try:
        found = next(lines, [])
    except (*DAMAGE, csv.Error) as error:
        raise ValueError(f"the header cannot be read: {error}") from error
    if not found or _problem(found):
        raise ValueError(f"the header {_problem(found) or 'is empty'}; expected a UTF-8 file that begins with names.")
    places = {ours: found.index(theirs) for theirs, ours in columns.kept(found).items()}
    rows = [
        cells if isinstance(cells, BadRow) else _checked({name: cells[place] for name, place in places.items()})
        for cells in _until_damage(_csv_lines(lines, len(found)))
    ]
    return FileRows(file, found, rows)


def _csv_lines(lines: Any, count: int) -> Iterator[list[str] | BadRow]:
    """The cells of each row; `lines` is a `csv.reader`, which can go on after a row that it refuses."""
    while True:
        try:
            cells = next(lines, None)
        except csv.Error as error:
            yield BadRow(f"line {lines.line_num}: {error}")
            continue
        if cells is None:
            return
        if len(cells) == count:
            yield cells
        elif cells:
            yield BadRow(f"line {lines.line_num}: found {len(cells)} fields; expected {count}")


# ---- JSON


def _read_json(stream: TextIO, columns: ColumnSelection, *, file: str) -> FileRows:
    return object_rows(_until_damage(_json_rows(stream)), columns, file=file)


def object_rows(objects: Iterable[Row | BadRow], columns: ColumnSelection, *, file: str) -> FileRows:
    """The selected columns of objects, each with keys of its own."""
    found: dict[str, None] = {}
    rows: list[Row | BadRow] = []
    for row in objects:
        if isinstance(row, BadRow):
            rows.append(row)
        else:
            found |= dict.fromkeys(row)
            rows.append(_checked({ours: row[theirs] for theirs, ours in columns.kept([*row]).items()}))
    return FileRows(file, [*found], rows)


def _json_rows(stream: TextIO) -> Iterator[dict[str, Any] | BadRow]:
    """The objects of a list, if the file begins with one; else one object per line."""
    blank = ""
    while (char := stream.read(1)).isspace():
        blank += char
    if char == "[":
        chunks = [blank, char]
        try:
            # In small pieces, because a read that meets damage loses all that it had read before.
            chunks.extend(iter(partial(stream.read, 2**12), ""))
        finally:
            yield from _json_list("".join(chunks))  # also before the error of a damaged file goes on
    else:
        lines = itertools.chain([char + stream.readline()], stream)
        numbered = enumerate(lines, blank.count("\n") + 1)
        yield from (_json_line(line.strip(), number) for number, line in numbered if line.strip())


def _json_line(line: str, number: int) -> dict[str, Any] | BadRow:
    try:
        row, end = _decoded(line, 0)
        if not line[end:].strip():
            return row
        problem = "it goes on after the object"
    except ValueError as error:
        problem = _problem(line) or str(error)
    return BadRow(f"line {number} is not one JSON object ({problem}): {shortened(line)}")


def _json_list(text: str) -> Iterator[dict[str, Any] | BadRow]:
    separator, end, problem = LIST_START.match(text), 0, ""
    while separator and not separator[1]:
        end = separator.end()
        try:
            row, end = _decoded(text, end)
        except ValueError as error:
            problem = f"not JSON ({error})"
            break
        yield row
        separator = LIST_NEXT.match(text, end)
    else:
        end = separator.end() if separator else end
        if separator is None or text[end:].strip():
            problem = "not the next row or the end of the list"
    if problem:
        line, rest = text.count("\n", 0, end) + 1, shortened(text[end : end + 100])
        yield BadRow(f"line {line}: {problem}, and what follows cannot be read: {rest}")


def _decoded(text: str, start: int) -> tuple[dict[str, Any] | BadRow, int]:
    """The object that begins at `start`, and the position of its end; raises ValueError for invalid JSON."""
    try:
        row, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_NESTING} deep") from error
    return row if isinstance(row, dict) else BadRow(f"found {shortened(text[start:end])}; expected an object"), end


# ---- damage and values that cannot be used


def _until_damage(rows: Iterable[Any]) -> Iterator[Any]:
    """`rows` up to the damage in a file, and a bad row in place of those that cannot be read any more."""
    try:
        yield from rows
    except DAMAGE as error:
        yield BadRow(f"the file is damaged here ({error}), and what follows cannot be read")


def _checked(row: dict[str, Any]) -> Row | BadRow:
    """The row, or the first problem of its values."""
    bad = (BadRow(f"`{name}` {problem}") for name, value in row.items() if (problem := _problem(value)))
    return next(bad, row)


def _problem(value: Any, depth: int = 0) -> str:
    """Why a value, or anything inside it, cannot be used; empty if it can."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"has half of a character, or bytes that are not UTF-8, at character {error.start}"
        return ""
    if isinstance(value, _HugeInteger):
        return f"holds a number of more than {sys.get_int_max_str_digits()} digits"
    if not isinstance(value, dict | list):
        return ""
    if depth == MAX_NESTING:
        return f"is nested more than {MAX_NESTING} deep"
    items = [*value, *value.values()] if isinstance(value, dict) else value
    return next((problem for item in items if (problem := _problem(item, depth + 1))), "")
