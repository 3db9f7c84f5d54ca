"""Reads one data set: a file, a folder, or a hub id. What a row must hold is the business of `data/rows.py`.

JSON, JSON lines and CSV are parsed here, so that an error can name the line; every field of a CSV stays text. Nothing
is unpickled and no code of a data set runs.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable
from pyarrow import csv, parquet

from rlhf.config import SourceConfig

READABLE = (".json", ".jsonl", ".csv", ".parquet")
SPLITS = ("train", "training", "eval", "evaluation", "valid", "validation", "dev", "test")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_rows(source: SourceConfig) -> datasets.Dataset:
    """The rows of a source, its columns renamed as `source.columns` says; other columns are kept.

    A relative path is looked for in the working directory, then beside this project's packages.
    """
    path = find(source.path)
    if path is None:
        rows = _from_hub(source)
    elif path.is_dir():
        rows = _from_folder(path, source)
    else:
        rows = _from_file(path)
    if len(rows) == 0:
        raise ValueError(f"data source {source.path}: no rows; expected at least one.")
    return _renamed(rows, source)


def find(path: str) -> Path | None:
    """The file or folder that `path` means, or None where it can only be a hub id."""
    project = Path(str(resources.files("data"))).parent
    for candidate in (Path(path).expanduser(), project / path):
        if candidate.exists():
            return candidate
    if _kind(Path(path)) in READABLE or not HUB_ID.fullmatch(path):
        raise ValueError(
            f"data source {path}: no such file or folder in {Path.cwd()} or {project}; expected one of {READABLE} "
            "(also .gz), a folder, or a hub id such as owner/name."
        )
    return None


def _kind(path: Path) -> str:
    """The file ending without `.gz`."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _from_hub(source: SourceConfig) -> datasets.Dataset:
    try:
        return datasets.load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data source {source.path}: neither a file nor a folder here, and the hub did not give split "
            f"{source.split!r} of it: {error}"
        ) from error


def _from_folder(folder: Path, source: SourceConfig) -> datasets.Dataset:
    if (folder / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(folder))
        if source.split not in saved:
            raise ValueError(f"data source {folder}: found splits {[*saved]}; expected {source.split!r} (`split`).")
        return saved[source.split]
    if (folder / "state.json").exists():
        return datasets.load_from_disk(str(folder))
    files = _files_of_split(folder, source.split)
    try:
        return datasets.concatenate_datasets([_from_file(file) for file in files])
    except (ValueError, pa.ArrowTypeError) as error:
        raise ValueError(f"data source {folder}: {[file.name for file in files]} do not join: {error}") from error


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The readable files of a folder; where names such as `train-0.jsonl` tell splits apart, those of `split`."""
    files = sorted(file for file in folder.iterdir() if _kind(file) in READABLE)
    words = {file: set(re.split(r"[^a-z]+", file.name.lower())) for file in files}
    named = any(words[file] & set(SPLITS) for file in files)
    chosen = [file for file in files if not named or split.lower() in words[file]]
    if not chosen:
        names = [file.name for file in sorted(folder.iterdir())]
        raise ValueError(f"data source {folder}: found {names}; expected {READABLE} files of split {split!r}.")
    return chosen


def _from_file(path: Path) -> datasets.Dataset:
    readers = {".json": _read_json, ".jsonl": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if _kind(path) not in readers:
        raise ValueError(f"data source {path}: found a {path.suffix or 'nameless'} file; expected one of {READABLE}.")
    try:
        table = readers[_kind(path)](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"data source {path}: not UTF-8 ({error}); convert it first.") from error
    except (pa.ArrowInvalid, OSError, EOFError) as error:
        raise ValueError(f"data source {path}: cannot be read: {error}") from error
    return datasets.Dataset(InMemoryTable(table))


def _read_parquet(path: Path) -> pa.Table:
    return parquet.read_table(path)


def _read_csv(path: Path) -> pa.Table:
    lines = csv.ParseOptions(newlines_in_values=True)
    names = csv.open_csv(path, parse_options=lines).schema.names
    text = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    return csv.read_csv(path, parse_options=lines, convert_options=text)


def _read_json(path: Path) -> pa.Table:
    stored = path.read_bytes()
    text = (gzip.decompress(stored) if path.suffix == ".gz" else stored).decode("utf-8-sig")
    rows = _json_list(path, text) if text.lstrip().startswith("[") else list(_json_lines(path, text))
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column(path, name, values=[row.get(name) for row in rows]) for name in names})


def _json_list(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"data source {path}, line {error.lineno}: not JSON: {error.msg}.") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"data source {path}, row {number}: found {_shown(row)}; expected an object.")
    return rows


def _json_lines(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"data source {path}, line {number}: not one JSON object ({error.msg}): {_shown(line)}"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"data source {path}, line {number}: found {_shown(row)}; expected an object.")
        yield row


def _column(path: Path, name: str, *, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(f"data source {path}, column {name}: its rows differ in type: {error}") from error


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _renamed(rows: datasets.Dataset, source: SourceConfig) -> datasets.Dataset:
    missing = [theirs for theirs in source.columns.values() if theirs not in rows.column_names]
    if missing or len(set(source.columns.values())) < len(source.columns):
        raise ValueError(
            f"data source {source.path}: found columns {rows.column_names}; `columns` renames {source.columns}, and "
            f"expects each right-hand name to be there, once. Missing: {missing}."
        )
    theirs = {theirs: ours for ours, theirs in source.columns.items()}
    replaced = [ours for ours in source.columns if ours in rows.column_names and ours not in theirs]
    return rows.remove_columns(replaced).rename_columns(theirs)
