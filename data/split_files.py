"""Finds the files of a split in a folder, which may be a clone of a hub data set.

The `configs` of README.md (or of .huggingface.yaml) tell which files hold which split, as on the hub, and their
patterns are those of the `datasets` library. Without them the names do: `train.jsonl`,
`train_sft-00000-of-00003.parquet` and `test/0.csv` belong to the splits train, train_sft and test. That is also how
`datasets` reads, except where it would join what is not one split (train_sft and train_gen, or one file in two
formats); here the user chooses.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from data.formats import READABLE, file_type

logger = logging.getLogger(__name__)

SYNONYMS = (
    {"train", "training"},
    {"test", "testing", "eval", "evaluation"},
    {"validation", "valid", "val", "dev"},
)
SPLIT_WORDS = set[str]().union(*SYNONYMS)
METADATA = ("dataset_infos.json", "dataset_info.json", "state.json", "config.json")
FRONT_MATTER = re.compile(r"\s*---\s*\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)
SHARD = re.compile(r"[-_.]?\d+-of-\d+.*$|([-_.]?\d+)+$")
PLAIN_CONFIG = {"config_name", "data_files", "data_dir", "default", "description", "version", "drop_labels"}
"""Keys of a configuration that do not change how its files are read."""


def files_of_split(folder: Path, split: str, *, name: str | None, usual: str | None = None) -> list[Path] | None:
    """The readable files of a split; None where README.md also says how to read them, which `datasets` does.

    Args:
        folder: With data files in it, or in folders below if it has none itself.
        split: `split` of the source.
        name: `name` of the source: a configuration, in README.md or as a folder; None if there is only one.
        usual: The configuration to take where `name` is None, if it is there.

    Raises:
        ValueError: There is no such split, or more than one that could be meant; says which there are.
    """
    try:
        config = _configuration(folder, name, usual=usual)
        if set(config) - PLAIN_CONFIG:
            return None
        below = folder / str(config.get("data_dir", "."))
        return (
            _declared_files(below, config["data_files"], split=split)
            if "data_files" in config
            else _named_files(below, split)
        )
    except (AttributeError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"data source {folder}: `configs` in README.md is not as on the hub ({error!r}).") from error
    except ValueError as error:
        raise ValueError(f"data source {folder}: {error}") from error


def _configuration(folder: Path, name: str | None, *, usual: str | None) -> Mapping[str, Any]:
    """The configuration called `name` in README.md, or the folder of that name."""
    configs = {str(config.get("config_name", "default")): config for config in card_head(folder).get("configs") or []}
    name = usual if name is None and usual and (usual in configs or (folder / usual).is_dir()) else name
    if not configs:
        if name is not None and not (folder / name).is_dir():
            raise ValueError(f"found no configuration {name!r}: expected it in README.md, or as a folder.")
        return {"data_dir": name or "."}
    default = next((key for key, config in configs.items() if config.get("default")), "default")
    wanted = name or (default if len(configs) > 1 else next(iter(configs)))
    if wanted not in configs:
        raise ValueError(f"README.md has the configurations {[*configs]}; expected one of them as `name`, not {name}.")
    found: Mapping[str, Any] = configs[wanted]
    return found


def card_head(folder: Path) -> Mapping[str, Any]:
    """The head of README.md, or .huggingface.yaml, which comes first."""
    own, readme = folder / ".huggingface.yaml", folder / "README.md"
    text = own.read_text("utf-8") if own.is_file() else None
    if text is None and readme.is_file():
        found = FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
        text = found[1] if found else None
    try:
        head = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ValueError(f"the head of README.md is not YAML ({error}); repair or remove it.") from error
    return head if isinstance(head, dict) else {}


def _declared_files(folder: Path, declared: Any, *, split: str) -> list[Path]:
    """The files of a split by the patterns in `data_files`; those of other splits need not be there."""
    from datasets.data_files import resolve_pattern, sanitize_patterns  # slow to import

    try:
        splits = sanitize_patterns(declared)
    except (TypeError, ValueError) as error:
        raise ValueError(f"README.md has data_files {declared}, which are not as on the hub: {error}") from error
    patterns = splits[_meant(split, splits, among="README.md has the splits")]
    found: dict[Path, None] = {}
    for pattern in patterns:
        try:
            found |= dict.fromkeys(map(Path, resolve_pattern(pattern, str(folder.resolve()))))
        except FileNotFoundError as error:
            raise ValueError(f"README.md has split {split!r} in {pattern}; found no file there.") from error
    files = [file for file in found if file_type(file) in READABLE]
    if not files:
        raise ValueError(f"README.md has split {split!r} in {patterns}; found no {READABLE} file there.")
    return files


def _meant(split: str, splits: Iterable[str], *, among: str) -> str:
    """The split that is called `split`, or the only one with that word, or another word for it, in its name."""
    same = {split.lower()}.union(*(words for words in SYNONYMS if split.lower() in words))
    meant = [name for name in splits if name == split] or [name for name in splits if same & _words(name)]
    if len(meant) != 1:
        raise ValueError(f"{among} {[*splits]}; expected one of them as `split`, not {split!r}.")
    return meant[0]


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
    chosen = splits[_meant(split, splits, among="found splits")]
    if unnamed:
        logger.warning("data source %s: %s are of no split, and are not read", folder, [file.name for file in unnamed])
    _require_one_format(chosen, folder)
    return chosen


def _require_one_format(files: list[Path], folder: Path) -> None:
    """Say so where the files are in several folders; refuse several formats, which may hold the same rows twice."""
    folders = sorted({str(file.parent.relative_to(folder)) for file in files})
    kinds = sorted({file_type(file).replace(".jsonl", ".json") for file in files})
    if len(kinds) > 1:
        raise ValueError(f"found files of one split in the formats {kinds}; expected one: give each as its own path.")
    if len(folders) > 1:
        logger.warning("data source %s: reading the files of %s; `name` would choose one of them", folder, folders)


def _split_of(file: Path, folder: Path) -> str:
    """The split in the name of a file, or of a folder that it is in; empty if there is none."""
    names = [file.name[: file.name.lower().rindex(file_type(file))], *file.relative_to(folder).parts[-2::-1]]
    return next((name for name in (SHARD.sub("", name) for name in names) if SPLIT_WORDS & _words(name)), "")


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.is_file() and file_type(file) in READABLE and file.name not in METADATA
