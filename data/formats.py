"""One reader for each kind of file: JSON, JSON lines, CSV and Parquet.

Each row keeps the keys, types and nulls that it has in the file: rows are not merged into one schema. A row that
cannot be read becomes a `BrokenRow` with the place and the reason, and counts like the others. Columns that nobody
wants are left out before anything is asked of them. Every field of a CSV stays text. Nothing is unpickled.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import pyarrow as pa
from pyarrow import parquet

from data.rows import BrokenRow
from data.table import Columns, Part, Rows
from rlhf.text.tokenizer import Row

READABLE = (".json", ".jsonl", ".csv", ".parquet")
MAX_NESTING = 100
DAMAGE = (EOFError, OSError, zlib.error)
GIT_LFS = b"version https://git-lfs"
LIST_START, LIST_NEXT = re.compile(r"\s*\[\s*(\])?"), re.compile(r"\s*(?:,|(\]))\s*")


class _HugeInteger:
    """Stands for a number with more digits than Python converts."""


def _integer(digits: str) -> int | _HugeInteger:
    limit = sys.get_int_max_str_digits()
    return _HugeInteger() if limit and len(digits) > limit else int(digits)


DECODER = json.JSONDecoder(parse_int=_integer)


def kind(path: Path) -> str:
    """The file ending without `.gz`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def read_file(path: Path, columns: Columns) -> Rows:
    """The rows of a file.

    Raises:
        ValueError: The file as a whole cannot be read.
    """
    if kind(path) not in READABLE:
        raise ValueError(f"data source {path}: found a {path.suffix or 'nameless'} file; expected one of {READABLE}.")
    try:
        with path.open("rb") as file:
            if file.read(len(GIT_LFS)) == GIT_LFS:
                raise ValueError("found a Git LFS pointer instead of the data; run `git lfs pull` in its folder.")
        if kind(path) == ".parquet":
            return _read_parquet(path, columns)
        with _opened(path) as stream:
            return (_read_csv if kind(path) == ".csv" else _read_json)(stream, columns, name=path.name)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data source {path}: cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"data source {path}: {error}") from error


def _opened(path: Path) -> TextIO:
    """The text of a file; bytes that are not UTF-8 become halves of characters, see `_text_problem`."""
    opened = partial(gzip.open, path) if path.suffix == ".gz" else path.open
    newline = "" if kind(path) == ".csv" else "\n"
    return cast(TextIO, opened(mode="rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline))


def _read_parquet(path: Path, columns: Columns) -> Rows:
    file = parquet.ParquetFile(path)
    found = file.schema_arrow.names
    kept = columns.kept(found)
    table = file.read(columns=[*kept])
    if not kept:
        return Rows(found, [Part(path.name, 0, [{}] * file.metadata.num_rows)])
    parts, first = [], 0
    for batch in table.rename_columns([kept[name] for name in table.column_names]).to_batches():
        parts.append(Part(path.name, first, batch))
        first += len(batch)
    return Rows(found, parts)


def _read_csv(stream: TextIO, columns: Columns, *, name: str) -> Rows:
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(stream, strict=True)
    try:
        found = next(lines, [])
    except (*DAMAGE, csv.Error) as error:
        raise ValueError(f"the header cannot be read: {error}") from error
    if not found or _problem(found):
        raise ValueError(f"the header {_problem(found) or 'is empty'}; expected a UTF-8 file that begins with names.")
    kept = columns.kept(found)
    places = {ours: found.index(theirs) for theirs, ours in kept.items()}
    rows: list[Row] = []
    for cells in _until_damage(_cells(lines, len(found))):
        broken = isinstance(cells, BrokenRow)
        rows.append(cells if broken else _checked({ours: cells[place] for ours, place in places.items()}))
    return Rows(found, [Part(name, 0, rows)])


def _cells(lines: Any, count: int) -> Iterator[Any]:
    """The cells of each row; `lines` is a `csv.reader`, which goes on after a row that it refuses."""
    while True:
        try:
            cells = next(lines, None)
        except csv.Error as error:
            cells = BrokenRow(problem=f"line {lines.line_num}: {error}")
        if cells is None:
            return
        if not isinstance(cells, BrokenRow) and len(cells) not in (0, count):
            cells = BrokenRow(problem=f"line {lines.line_num}: found {len(cells)} fields; expected {count}")
        if cells:
            yield cells


def _read_json(stream: TextIO, columns: Columns, *, name: str) -> Rows:
    found: dict[str, None] = {}
    rows: list[Row] = []
    for row in _until_damage(_json_rows(stream)):
        if isinstance(row, BrokenRow):
            rows.append(row)
        else:
            found |= dict.fromkeys(row)
            rows.append(_checked({ours: row[theirs] for theirs, ours in columns.kept([*row]).items()}))
    return Rows([*found], [Part(name, 0, rows)])


def _json_rows(stream: TextIO) -> Iterator[Any]:
    """The objects of a list, where the file begins with one, else one a line."""
    start = ""
    while (char := stream.read(1)).isspace():
        start += char
    if char == "[":
        chunks, damage = _all_of(stream)
        yield from _json_list("".join([start, char, *chunks]))
        if damage is not None:
            raise damage
    else:
        lines = itertools.chain([char + stream.readline()], stream)
        numbered = enumerate(lines, start.count("\n") + 1)
        yield from (_json_line(line.strip(), number) for number, line in numbered if line.strip())


def _all_of(stream: TextIO) -> tuple[list[str], Exception | None]:
    """What can be read, and why not more."""
    chunks: list[str] = []
    try:
        chunks.extend(iter(partial(stream.read, 2**12), ""))  # the characters of a call that fails are lost
    except DAMAGE as error:
        return chunks, error
    return chunks, None


def _json_line(line: str, number: int) -> Any:
    try:
        row, end = _decoded(line, 0)
        if not line[end:].strip():
            return row
        problem = "it goes on after the object"
    except ValueError as error:
        problem = _problem(line) or str(error)
    return BrokenRow(problem=f"line {number} is not one JSON object ({problem}): {_shown(line)}")


def _json_list(text: str) -> Iterator[Any]:
    found, end = LIST_START.match(text), 0
    while found and not found[1]:
        try:
            row, end = _decoded(text, found.end())
        except ValueError as error:
            yield _broken_list(text, found.end(), problem=f"not JSON ({error})")
            return
        yield row
        found = LIST_NEXT.match(text, end)
    rest = text[found.end() :] if found else text[end:]
    if rest.strip() or not found:
        yield _broken_list(text, len(text) - len(rest), problem="not the next row or the end of the list")


def _broken_list(text: str, position: int, *, problem: str) -> BrokenRow:
    line = text.count("\n", 0, position) + 1
    return BrokenRow(
        problem=f"line {line}: {problem}, and what follows cannot be read: {_shown(text[position : position + 100])}"
    )


def _decoded(text: str, start: int) -> tuple[Any, int]:
    """The object that begins at `start`, and where it ends; raises ValueError for what is no JSON."""
    try:
        row, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_NESTING} deep") from error
    return row if isinstance(row, dict) else BrokenRow(
        problem=f"found {_shown(text[start:end])}; expected an object"
    ), end


def _shown(text: str) -> str:
    readable = text[:78].encode(errors="replace").decode()
    return readable if len(text) <= 77 else readable[:77] + "..."


def _until_damage(rows: Iterator[Any]) -> Iterator[Any]:
    """`rows`, and a broken one where the file is damaged and nothing more can be read."""
    try:
        yield from rows
    except DAMAGE as error:
        yield BrokenRow(problem=f"the file is damaged here ({error}), and what follows cannot be read")


def _checked(row: dict[str, Any]) -> Row:
    problems = (f"`{name}` {problem}" for name, value in row.items() if (problem := _problem(value)))
    problem = next(problems, "")
    return BrokenRow(problem=problem) if problem else row


def _problem(value: Any, depth: int = 0) -> str:
    """What makes a value unusable, wherever in it; empty where it can be used."""
    if isinstance(value, str):
        return "" if value.isascii() else _text_problem(value)
    if isinstance(value, _HugeInteger):
        return f"holds a number of more than {sys.get_int_max_str_digits()} digits"
    if not isinstance(value, dict | list):
        return ""
    if depth == MAX_NESTING:
        return f"is nested more than {MAX_NESTING} deep"
    items = [*value, *value.values()] if isinstance(value, dict) else value
    return next((problem for item in items if (problem := _problem(item, depth + 1))), "")


def _text_problem(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half of a character, or bytes that are not UTF-8, at character {error.start}"
    return ""
