"""`config.json` in the folder of a stage: the settings that its results depend on.

Settings that change only memory and speed may differ when the same run is started again.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rlhf.config.bounds import as_plain
from rlhf.config.run_config import FOLDERS, RunConfig
from rlhf.runtime.atomic_files import read_json

CONFIG = "config.json"
_FREE = (
    *("selected", "micro_batch_size", "micro_batch_tokens", "rollout_micro_batch_size"),
    *("reward_timeout_s", "reward_on_error"),
)
_FREE_SUFFIXES = ("cache_dir",)
_FREE_IN_ENGINES = (
    *(
        "zero_stage",
        "shard_ranks",
        "device",
        "offload_optimizer",
        "offload_param",
        "nvme_path",
        "buffer_count",
        "buffer_size",
    ),
    *("pipeline_read", "pipeline_write", "pin_memory", "optimizer_share", "parameters_in_cpu", "sub_group_size"),
    *("reduce_bucket_size", "prefetch_bucket_size", "max_live_parameters", "persistence_threshold", "overlap_comm"),
    *("stream_generation", "activation_checkpointing", "activation_offload", "max_skipped_steps", "master_weights"),
    *("cuda_graphs", "attention", "padding_free"),
)
"""They change memory, speed and when a run gives up, but no results beyond rounding, unlike precision or moments."""


def settings_of(run: RunConfig, stage: str) -> dict[str, Any]:
    """Every setting that the results of `stage` depend on, by dotted name, and the earlier stages that it builds on."""
    plain = as_plain(run)
    parts = {stage: plain[stage], "model": plain["model"], "data": {stage: plain["data"][stage]}}
    parts["data"] |= {name: plain["data"][name] for name in ("stage_split", "split_seed")}
    flat = {name: value for name, value in flat_settings(parts, "").items() if not _is_free(name)}
    here = run.output_dir  # not part of the settings: a folder may be moved
    flat = {name: value.replace(here, "OUTPUT") if isinstance(value, str) else value for name, value in flat.items()}
    makers = [maker for maker in FOLDERS if any(str(value).startswith(f"OUTPUT/{maker}/") for value in flat.values())]
    return flat | {f"{stage} is made from {maker}": _digest(Path(here) / maker / CONFIG) for maker in makers}


def settings_behind(model: str) -> dict[str, Any]:
    """The settings, by dotted name, of the stage that made a model, by the record in its folder; empty without one."""
    folder = Path(model).expanduser().parent
    folder = folder.parent if folder.name == "best" else folder
    if not (folder / CONFIG).is_file():
        return {}
    found = read_json(folder / CONFIG, mend="Bring it back from a copy.")
    here = str(folder.absolute().parent)
    return {name: value.replace("OUTPUT", here) if isinstance(value, str) else value for name, value in found.items()}


def _digest(path: Path) -> str | None:
    """Short hash of the settings of an earlier stage, None if that has not run."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else None


def _is_free(name: str) -> bool:
    *group, setting = name.split(".")
    in_engine = len(group) == 2 and group[1].endswith("engine")
    return name.partition(".")[2] in _FREE or setting in _FREE_SUFFIXES or (in_engine and setting in _FREE_IN_ENGINES)


def flat_settings(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    """All settings by dotted name, of groups and of lists of groups."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(place): item for place, item in enumerate(value)}
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
