"""Reads one data set: a file, a folder, or a hub id. What a row must hold is the business of `data/rows.py`."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from importlib import resources
from pathlib import Path

import datasets
import pyarrow as pa

from data.folders import files_of_split
from data.formats import READABLE, kind, read_file
from data.table import Columns, Part, Rows, joined
from rlhf.config.data_config import SourceConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_rows(source: SourceConfig, wanted: Collection[str] | None = None) -> Rows:
    """The rows of a source, its columns renamed as `source.columns` says.

    A relative path is looked for in the working directory, then beside this project's packages.

    Args:
        source: One data set.
        wanted: Our names of the columns that are kept; None keeps all.
    """
    path, columns = find(source.path), Columns(source.columns, wanted)
    if path is None:
        rows = _of_dataset(_from_hub(source), columns, file=source.path)
    elif path.is_file():
        rows = read_file(path, columns)
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        rows = _of_dataset(_saved(path, source), columns, file=path.name)
    else:
        rows = joined([read_file(file, columns) for file in files_of_split(path, source.split, name=source.name)])
    if len(rows) == 0:
        raise ValueError(f"data source {source.path}: no rows; expected at least one.")
    missing = [theirs for theirs in source.columns.values() if rows.columns and theirs not in rows.columns]
    if missing or len(set(source.columns.values())) < len(source.columns):
        raise ValueError(
            f"data source {source.path}: found columns {rows.columns}; `columns` renames {source.columns}, and "
            f"expects each right-hand name to be there, once. Missing: {missing}."
        )
    return replace(rows, columns=[ours for theirs in rows.columns if (ours := columns.called(theirs)) is not None])


def find(path: str) -> Path | None:
    """The file or folder that `path` means, or None where it can only be a hub id."""
    project = Path(str(resources.files("data"))).parent
    for candidate in (Path(path).expanduser(), project / path):
        if candidate.exists():
            return candidate
    if kind(Path(path)) in READABLE or not HUB_ID.fullmatch(path):
        raise ValueError(
            f"data source {path}: no such file or folder in {Path.cwd()} or {project}; expected one of {READABLE} "
            "(also .gz), a folder, or a hub id such as owner/name."
        )
    return None


def _from_hub(source: SourceConfig) -> datasets.Dataset:
    try:
        return datasets.load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data source {source.path}: neither a file nor a folder here, and the hub did not give split "
            f"{source.split!r} of it: {error}"
        ) from error


def _saved(folder: Path, source: SourceConfig) -> datasets.Dataset:
    """A folder of `save_to_disk`."""
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"data source {folder}: cannot be read: {error}") from error
    if isinstance(saved, datasets.Dataset):
        return saved
    if source.split not in saved:
        raise ValueError(f"data source {folder}: found splits {[*saved]}; expected {source.split!r} (`split`).")
    return saved[source.split]


def _of_dataset(rows: datasets.Dataset, columns: Columns, *, file: str) -> Rows:
    kept = columns.kept(rows.column_names)
    chosen = rows.select_columns([*kept]).rename_columns(kept) if kept else [{}] * len(rows)
    return Rows(rows.column_names, [Part(file, 0, chosen)])
