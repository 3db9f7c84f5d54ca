"""Finds a model on disk or on the hub, lists its tensors, and reads rows of one.

Only safetensors are read; nothing is unpickled. See also: `weights.py`, which fits tensors to a module's parameters.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf.runtime.atomic_files import read_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]  # its head states the licence
_HUB_SKIPPED = ["*/*", "consolidated*"]


def local_folder(path: str | Path, *, weights: bool = True) -> Path:
    """The folder of the model `path`.

    Args:
        path: A folder, or a hub id, which is downloaded into the hub's cache.
        weights: False downloads only the JSON files, which is enough to know how large the model is.

    Raises:
        ValueError: There is no such folder and no such model on the hub, or the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(str(path)):
        raise ValueError(
            f"Model {str(path)!r}: there is no such folder, and it is no hub id such as `Qwen/Qwen3-0.6B`."
        )
    try:
        wanted = _HUB_FILES if weights else ["*.json"]
        return Path(snapshot_download(str(path), allow_patterns=wanted, ignore_patterns=_HUB_SKIPPED))
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"Model {str(path)!r}: there is no such folder here, and the hub gave none either "
            f"({type(error).__name__}). Give a folder, or check the hub id, its licence gate and the network."
        ) from error


class ModelFolder:
    """A folder with `model.safetensors`, or with an index and several shards; its tensors are memory mapped."""

    def __init__(self, folder: Path) -> None:
        """Open every file, which compares its header with its size, and read the names of the tensors.

        Raises:
            ValueError: `folder` holds no safetensors, or not all of them, or one is damaged.
        """
        self.folder = folder
        indexed = _indexed(folder)
        files = sorted(set(indexed.values())) or [_SINGLE]
        self._open: dict[str, Any] = {file: _opened(folder / file) for file in files}
        found = {key: file for file, handle in self._open.items() for key in handle.keys()}  # noqa: SIM118
        self._file_of = indexed or found
        astray = [key for key, file in indexed.items() if found.get(key) != file]
        if astray:
            raise ValueError(
                f"Model folder {folder}: {_INDEX} looks for {len(astray)} tensors in files that lack them, such as "
                f"{astray[0]!r}. The files are not of one model: copy them again."
            )

    def __contains__(self, key: object) -> bool:
        return key in self._file_of

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def shape(self, key: str) -> torch.Size:
        """Shape of the tensor `key`, without reading it."""
        return torch.Size(self._handle(key).get_slice(key).get_shape())

    def read(self, key: str, rows: slice) -> Tensor:
        """Rows of the tensor `key` on the CPU in its stored type; only these rows are read from disk."""
        handle = self._handle(key)
        tensor: Tensor = handle.get_slice(key)[rows] if self.shape(key) else handle.get_tensor(key)
        return tensor

    def _handle(self, key: str) -> Any:
        return self._open[self._file_of[key]]


def _indexed(folder: Path) -> dict[str, str]:
    """The file of each tensor by the index; empty for a single file, which has no index."""
    if not (folder / _INDEX).is_file():
        if not (folder / _SINGLE).is_file():
            raise ValueError(_no_weights(folder))
        return {}
    files = read_json(folder / _INDEX, mend="Copy it again.").get("weight_map")
    if not (isinstance(files, dict) and files and all(isinstance(file, str) for file in files.values())):
        raise ValueError(f"Model folder {folder}: {_INDEX} has no `weight_map` of files. Copy it again.")
    absent = sorted(file for file in set(files.values()) if not (folder / file).is_file())
    if absent:
        raise ValueError(f"Model folder {folder}: {_INDEX} names {absent}, which are not there. Copy them again.")
    return files


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged, or cannot be read: {error}. Copy it again.") from error


def _no_weights(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return (
            f"Model folder {folder} holds a PEFT adapter, not a model. Merge it first: "
            "`AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new)`."
        )
    if any(folder.glob("pytorch_model*.bin")):
        return (
            f"Model folder {folder} has its weights in `.bin` files only, which are pickles and are never opened here. "
            "Convert it once where you trust it: `AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new)`."
        )
    return f"Model folder {folder} holds no weights: expected `{_SINGLE}`, or `{_INDEX}` and its shards."
