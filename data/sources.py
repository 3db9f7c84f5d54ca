"""Finds and reads one data set: a file, a folder, a hub id, a known name, or what a function of the user generates.

A folder is written by `save_to_disk`, is a clone of a hub data set, or holds the user's own files. See also:
`split_files.py` (finds the files of a split), `known_datasets.py` (maps the rows of known data sets), `formats.py`
(reads a file), `rows.py` (checks the rows).
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from data.formats import COMPRESSED, READABLE, arrow_rows, file_type, object_rows, read_file
from data.known_datasets import KnownDataset, known_dataset, known_datasets, named, own_columns
from data.rows import ColumnSelection, FileRows, SourceRows
from data.split_files import files_of_split
from rlhf.config.data_config import SourceConfig
from rlhf.runtime.user_functions import described, load_function

if TYPE_CHECKING:
    from datasets import Dataset  # slow to import, so only the functions that need it do so

logger = logging.getLogger(__name__)

FUNCTION = re.compile(r"[^:]+:[A-Za-z_][\w.]*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SAVED = ("dataset_dict.json", "state.json")
"""Files of a folder that `save_to_disk` wrote."""


def load_rows(
    source: SourceConfig, wanted: Collection[str] | None = None, *, stage: str = "", chat: bool = False
) -> SourceRows:
    """The rows of a source, under our names of columns; keeps those that are `wanted`, None all.

    A relative path is looked for in the working directory, then beside this project's packages.

    Args:
        source: Its columns are renamed as `columns` says, or as the map of a known data set does.
        wanted: Names of ours.
        stage: Decides which split of a known data set is its `train`, and whether ties are left out.
        chat: Turn the dialogues of known data sets into messages.
    """
    known = known_dataset(source)
    columns = ColumnSelection(source.columns, own_columns(known, wanted))
    rows = SourceRows(_read(source, columns, known=known, stage=stage))
    if len(rows) == 0:
        raise ValueError(f"data source {source.path}: no rows; expected at least one.")
    missing = [theirs for theirs in source.columns.values() if rows.found and theirs not in rows.found]
    if missing or len(set(source.columns.values())) < len(source.columns):
        raise ValueError(
            f"data source {source.path}: found columns {rows.found}; `columns` renames {source.columns}, and "
            f"expects each right-hand name to be there, once. Missing: {missing}."
        )
    if known is None:
        return rows
    where = f"data source {source.path}"
    return SourceRows([known.rows(file, stage=stage, chat=chat, where=where) for file in rows.files])


def _read(source: SourceConfig, columns: ColumnSelection, *, known: KnownDataset | None, stage: str) -> list[FileRows]:
    """The rows of a source as they are."""
    if FUNCTION.fullmatch(source.path) and not Path(source.path).exists():
        return [_from_function(source, columns)]
    path = local_path(source.path)
    split = known.split_of(source.split, stage) if known else source.split
    usual = known.config if known else None
    if path is not None and path.is_file():
        return [read_file(path, columns)]
    if path is not None and not any((path / name).exists() for name in SAVED):
        files = files_of_split(path, split, name=source.name, usual=usual)
        if files is not None:
            return [read_file(file, columns) for file in files]
        table = _load(source, str(path), name=source.name or usual, split=split)
    elif path is not None:
        table = _saved(path, source, split=split)
    else:
        hub = known.hub if known and "/" not in source.path else source.path
        table = _load(source, hub, name=source.name or usual, split=split)
    rows = table.with_format("arrow")[:]  # mapped, unread
    file = source.path if path is None else path.name
    return [arrow_rows(rows, columns, file=file, found=rows.column_names)]


def local_path(path: str) -> Path | None:
    """The file or folder that `path` means, or None if it can only be a hub id or the name of a known data set."""
    project = Path(str(resources.files("data"))).parent
    for candidate in (Path(path).expanduser(), project / path):
        if candidate.exists():
            return candidate
    if named(path) and "/" not in path:
        return None
    if file_type(Path(path)) in READABLE or not HUB_ID.fullmatch(path):
        near = difflib.get_close_matches(path, known_datasets(), n=1)
        places = dict.fromkeys((str(Path.cwd()), str(project)))
        raise ValueError(
            f"data source {path}: no such file or folder in {' or '.join(places)}; expected {', '.join(READABLE)} "
            f"(also {', '.join(COMPRESSED)}), a folder, a hub id such as owner/name, or the name of a known data set"
            f"{f' ({near[0]}?)' if near else ''}."
        )
    return None


# ---- rows that a function generates


def _from_function(source: SourceConfig, columns: ColumnSelection) -> FileRows:
    """The rows that the function `source.path` gives for `source.split` and `source.arguments`."""
    setting = f"data source {source.path}"
    signature = "called with split=... and `arguments`; it returns rows, each a mapping from columns to values"
    function = load_function(source.path, setting, signature=signature)
    try:
        rows = list(function(split=source.split, **source.arguments))
    except Exception as error:
        raise ValueError(f"{setting}: {described(error)}; it is {signature}.") from error
    odd = next((row for row in rows if not isinstance(row, Mapping)), None)
    if odd is not None:
        raise ValueError(f"{setting}: found a row of {type(odd).__name__}; it is {signature}.")
    return object_rows((dict(row) for row in rows), columns, file=source.path)


# ---- data sets of the `datasets` library


def _load(source: SourceConfig, path: str, *, name: str | None, split: str) -> Dataset:
    """A split of a hub data set, or of a folder whose README.md says how its files are to be read."""
    import datasets

    try:
        try:
            return datasets.load_dataset(path, name, split=split)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            # Such a data set is made by a program, which is not run; the hub keeps the result of most as Parquet.
            logger.info("data source %s: reading the hub's Parquet copy, as its script is not run", source.path)
            files = f"hf://datasets/{path}@refs/convert/parquet/{name or '*'}/{split}/*.parquet"
            return datasets.load_dataset("parquet", data_files={split: files}, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        place = "neither a file nor a folder here, and the hub" if local_path(source.path) is None else "README.md"
        raise ValueError(f"data source {source.path}: {place} did not give split {split!r} of it: {error}") from error


def _saved(folder: Path, source: SourceConfig, *, split: str) -> Dataset:
    """The data set in a folder that `save_to_disk` wrote."""
    import datasets
    import pyarrow as pa

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"data source {folder}: cannot be read: {error}") from error
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"data source {folder}: found splits {[*saved]}; expected {split!r} (`split`).")
    return saved[split]
