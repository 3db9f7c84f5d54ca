"""Which files of a folder hold which split, as a clone of a hub data set or a folder of one's own says it.

The `configs` of a README.md decide, where it has some (hub data sets do). Else the names decide: `train.jsonl`,
`train_sft-00000-of-00003.parquet` and `test/0.csv` are of the splits train, train_sft and test. A choice between
several is the user's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from data.formats import READABLE, kind

logger = logging.getLogger(__name__)

SPLIT_WORDS = {
    *("train", "training", "test", "testing", "eval", "evaluation"),
    *("valid", "validation", "val", "dev"),
}
METADATA = ("dataset_infos.json", "dataset_info.json", "state.json", "config.json")
FRONT_MATTER = re.compile(r"\s*---\s*\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)
SHARD = re.compile(r"[-_.]?\d+-of-\d+.*$|([-_.]?\d+)+$")


def files_of_split(folder: Path, split: str, *, name: str | None) -> list[Path]:
    """The readable files of a split.

    Args:
        folder: With data files in it, or in folders below where it has none itself.
        split: `split` of the source.
        name: `name` of the source: a configuration, in README.md or as a folder; None where there is but one.

    Raises:
        ValueError: There is no such split, or more than one that could be meant; says which there are.
    """
    try:
        config = _configuration(folder, name)
        declared = _declared_splits(config)
        if declared:
            return _declared_files(folder, split, declared=declared)
        return _named_files(folder / str(config.get("data_dir", ".")), split)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"data source {folder}: `configs` in README.md is not as on the hub ({error!r}).") from error
    except ValueError as error:
        raise ValueError(f"data source {folder}: {error}") from error


def _configuration(folder: Path, name: str | None) -> Mapping[str, Any]:
    """The configuration that README.md, or a folder, has under `name`."""
    readme = folder / "README.md"
    found = FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None
    try:
        head = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise ValueError(f"the head of README.md is not YAML ({error}); repair or remove it.") from error
    listed = head.get("configs") if isinstance(head, dict) else None
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
    """Split -> patterns of its files; empty where the configuration leaves that to their names."""
    files = config.get("data_files") or []
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    splits: dict[str, list[str]] = {}
    for item in [files] if isinstance(files, str) else files:
        split, path = (item["split"], item["path"]) if isinstance(item, dict) else ("train", item)
        splits.setdefault(str(split), []).extend([path] if isinstance(path, str) else path)
    return splits


def _declared_files(folder: Path, split: str, *, declared: dict[str, list[str]]) -> list[Path]:
    if split not in declared:
        raise ValueError(f"README.md has the splits {[*declared]}; expected one of them as `split`, not {split!r}.")
    files = {file for pattern in declared[split] for file in folder.glob(pattern) if kind(file) in READABLE}
    if not files:
        raise ValueError(f"README.md has split {split!r} in {declared[split]}; found no {READABLE} file there.")
    return sorted(files)


def _named_files(folder: Path, split: str) -> list[Path]:
    files = [file for file in sorted(folder.iterdir()) if _is_data(file)]
    files = files or [file for file in sorted(folder.rglob("*")) if _is_data(file) and not _is_hidden(file, folder)]
    splits: dict[str, list[Path]] = {}
    for file in files:
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
    return _of_one_place(splits[meant[0]], folder)


def _of_one_place(files: list[Path], folder: Path) -> list[Path]:
    """`files`, unless they are in several folders or of several kinds, which may be the same rows twice."""
    places = {f"{file.parent.relative_to(folder)}/*{kind(file).replace('.jsonl', '.json')}" for file in files}
    if len(places) > 1:
        raise ValueError(
            f"found files of one split in {sorted(places)}; expected one place: give each as its own path."
        )
    return files


def _split_of(file: Path, folder: Path) -> str:
    """The split that a file, or a folder that it is in, is named after; empty where none is."""
    names = [file.name[: file.name.lower().rindex(kind(file))], *file.relative_to(folder).parts[-2::-1]]
    return next((name for name in (SHARD.sub("", name) for name in names) if SPLIT_WORDS & _words(name)), "")


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _is_data(file: Path) -> bool:
    return file.is_file() and kind(file) in READABLE and file.name not in METADATA and not file.name.startswith(".")


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)
