"""Finds and reads one data set: a file, a folder, a hub id, or what a function of the user generates.

A folder is written by `save_to_disk`, is a clone of a hub data set, or holds the user's own files. The `configs` of its
README.md tell which files hold which split, as on the hub; without them the names do: `train.jsonl`,
`train_sft-00000-of-00003.parquet` and `test/0.csv` belong to the splits train, train_sft and test. Where several splits
could be meant, the user chooses. See also: `formats.py` (reads a file), `rows.py` (checks the rows).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from data.formats import READABLE, arrow_rows, file_type, object_rows, read_file
from data.rows import ColumnSelection, FileRows, SourceRows
from rlhf.config.data_config import SourceConfig
from rlhf.runtime.user_functions import described, load_function

if TYPE_CHECKING:
    from datasets import Dataset  # slow to import, so only the functions that need it do so

logger = logging.getLogger(__name__)

FUNCTION = re.compile(r"[^:]+:[A-Za-z_][\w.]*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SPLIT_WORDS = {
    *("train", "training", "test", "testing", "eval", "evaluation"),
    *("valid", "validation", "val", "dev"),
}
METADATA = ("dataset_infos.json", "dataset_info.json", "state.json", "config.json")
FRONT_MATTER = re.compile(r"\s*---\s*\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)
SHARD = re.compile(r"[-_.]?\d+-of-\d+.*$|([-_.]?\d+)+$")


def load_rows(source: SourceConfig, wanted: Collection[str] | None = None) -> SourceRows:
    """The rows of a source, its columns renamed as `source.columns` says; keeps those that are `wanted`, None all.

    A relative path is looked for in the working directory, then beside this project's packages.
    """
    columns = ColumnSelection(source.columns, wanted)
    generated = FUNCTION.fullmatch(source.path) and not Path(source.path).exists()
    path = None if generated else local_path(source.path)
    if generated:
        rows = SourceRows([_from_function(source, columns)])
    elif path is None or (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        table = (_from_hub(source) if path is None else _saved(path, source)).with_format("arrow")[:]  # mapped, unread
        file = source.path if path is None else path.name
        rows = SourceRows([arrow_rows(table, columns, file=file, found=table.column_names)])
    else:
        files = [path] if path.is_file() else files_of_split(path, source.split, name=source.name)
        rows = SourceRows([read_file(file, columns) for file in files])
    if len(rows) == 0:
        raise ValueError(f"data source {source.path}: no rows; expected at least one.")
    missing = [theirs for theirs in source.columns.values() if rows.found and theirs not in rows.found]
    if missing or len(set(source.columns.values())) < len(source.columns):
        raise ValueError(
            f"data source {source.path}: found columns {rows.found}; `columns` renames {source.columns}, and "
            f"expects each right-hand name to be there, once. Missing: {missing}."
        )
    return rows


def local_path(path: str) -> Path | None:
    """The file or folder that `path` means, or None if it can only be a hub id."""
    project = Path(str(resources.files("data"))).parent
    for candidate in (Path(path).expanduser(), project / path):
        if candidate.exists():
            return candidate
    if file_type(Path(path)) in READABLE or not HUB_ID.fullmatch(path):
        raise ValueError(
            f"data source {path}: no such file or folder in {Path.cwd()} or {project}; expected one of {READABLE} "
            "(also .gz), a folder, or a hub id such as owner/name."
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


def _from_hub(source: SourceConfig) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data source {source.path}: neither a file nor a folder here, and the hub did not give split "
            f"{source.split!r} of it: {error}"
        ) from error


def _saved(folder: Path, source: SourceConfig) -> Dataset:
    """The data set in a folder that `save_to_disk` wrote."""
    import datasets
    import pyarrow as pa

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"data source {folder}: cannot be read: {error}") from error
    if isinstance(saved, datasets.Dataset):
        return saved
    if source.split not in saved:
        raise ValueError(f"data source {folder}: found splits {[*saved]}; expected {source.split!r} (`split`).")
    return saved[source.split]


# ---- the files of a split in a folder


def files_of_split(folder: Path, split: str, *, name: str | None) -> list[Path]:
    """The readable files of a split.

    Args:
        folder: With data files in it, or in folders below if it has none itself.
        split: `split` of the source.
        name: `name` of the source: a configuration, in README.md or as a folder; None if there is only one.

    Raises:
        ValueError: There is no such split, or more than one that could be meant; says which there are.
    """
    try:
        config = _configuration(folder, name)
        declared = _declared_splits(config)
        if not declared:
            return _named_files(folder / str(config.get("data_dir", ".")), split)
        if split not in declared:
            raise ValueError(f"README.md has the splits {[*declared]}; expected one of them as `split`, not {split!r}.")
        files = {file for pattern in declared[split] for file in folder.glob(pattern) if file_type(file) in READABLE}
        if not files:
            raise ValueError(f"README.md has split {split!r} in {declared[split]}; found no {READABLE} file there.")
        return sorted(files)
    except (AttributeError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"data source {folder}: `configs` in README.md is not as on the hub ({error!r}).") from error
    except ValueError as error:
        raise ValueError(f"data source {folder}: {error}") from error


def _configuration(folder: Path, name: str | None) -> Mapping[str, Any]:
    """The configuration called `name` in README.md, or the folder of that name."""
    readme = folder / "README.md"
    found = FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None
    try:
        head = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise ValueError(f"the head of README.md is not YAML ({error}); repair or remove it.") from error
    listed = head.get("configs") if isinstance(head, dict) else None
    configs: dict[str, Mapping[str, Any]]
    configs = {str(config.get("config_name", "default")): config for config in listed or []}
    if not configs:
        if name is not None and not (folder / name).is_dir():
            raise ValueError(f"found no configuration {name!r}: expected it in README.md, or as a folder.")
        return {"data_dir": name or "."}
    default = next((key for key, config in configs.items() if config.get("default")), "default")
    wanted = name or (default if len(configs) > 1 else next(iter(configs)))
    if wanted not in configs:
        raise ValueError(f"README.md has the configurations {[*configs]}; expected one of them as `name`, not {name}.")
    return configs[wanted]


def _declared_splits(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Split -> patterns of its files; empty if the configuration leaves that to their names."""
    files = config.get("data_files") or []
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    splits: dict[str, list[str]] = {}
    for item in [files] if isinstance(files, str) else files:
        split, path = (item["split"], item["path"]) if isinstance(item, dict) else ("train", item)
        splits.setdefault(str(split), []).extend([path] if isinstance(path, str) else path)
    return splits


def _named_files(folder: Path, split: str) -> list[Path]:
    here = [file for file in sorted(folder.iterdir()) if _is_data(file, folder)]
    splits: dict[str, list[Path]] = {}
    for file in here or [file for file in sorted(folder.rglob("*")) if _is_data(file, folder)]:
        splits.setdefault(_split_of(file, folder), []).append(file)
    unnamed = splits.pop("", [])
    if not splits and unnamed:
        splits, unnamed = {"train": unnamed}, []
    if not splits:
        raise ValueError(f"found {sorted(file.name for file in folder.iterdir())}; expected {READABLE} files.")
    meant = [split] if split in splits else [name for name in splits if split.lower() in _words(name)]
    if len(meant) != 1:
        raise ValueError(f"found splits {[*splits]}; expected one of them as `split`, not {split!r}.")
    if unnamed:
        logger.warning("data source %s: %s are of no split, and are not read", folder, [file.name for file in unnamed])
    chosen = splits[meant[0]]
    # The same rows may be there twice, once per folder or once per format.
    places = {f"{file.parent.relative_to(folder)}/*{file_type(file).replace('.jsonl', '.json')}" for file in chosen}
    if len(places) > 1:
        raise ValueError(
            f"found files of one split in {sorted(places)}; expected one place: give each as its own path."
        )
    return chosen


def _split_of(file: Path, folder: Path) -> str:
    """The split in the name of a file, or of a folder that it is in; empty if there is none."""
    names = [file.name[: file.name.lower().rindex(file_type(file))], *file.relative_to(folder).parts[-2::-1]]
    return next((name for name in (SHARD.sub("", name) for name in names) if SPLIT_WORDS & _words(name)), "")


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.is_file() and file_type(file) in READABLE and file.name not in METADATA
