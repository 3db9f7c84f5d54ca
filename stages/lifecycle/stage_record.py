"""How stages meet: folders on disk, and the record `stage.json` that travels with a model.

A stage is finished when its folder holds `stage.json`, written last. `config.json` says from which settings the folder
was made; settings that change memory but not results may differ when the same run is started again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any

from rlhf.config.bounds import as_plain
from rlhf.config.run_config import FOLDERS, RunConfig
from rlhf.engine.checkpoint.manager import steps_in
from rlhf.runtime.atomic_files import Seal, broken_seal, read_json, seal, write_text
from rlhf.runtime.dist import barrier, gather_objects
from rlhf.tracking.jsonl_log import Journal
from stages.lifecycle.checkpointing import CHECKPOINTS

log = logging.getLogger(__name__)

RECORD = "stage.json"
CONFIG = "config.json"
LOCK = ".lock"
_CHECKSUM = "sha256"
"""Of all else in a record."""
_LONG = 4e9
"""Bytes whose hashing is announced."""
_FREE = ("selected", "micro_batch_size", "rollout_micro_batch_size")
_FREE_SUFFIXES = ("cache_dir",)
_FREE_IN_ENGINES = (
    *("zero_stage", "device", "offload_optimizer", "offload_param", "nvme_path", "buffer_count", "buffer_size"),
    *("pipeline_read", "pipeline_write", "pin_memory", "optimizer_share", "parameters_in_cpu", "sub_group_size"),
    *("reduce_bucket_size", "prefetch_bucket_size", "max_live_parameters", "persistence_threshold", "overlap_comm"),
    *("stream_generation", "activation_checkpointing", "activation_offload", "max_skipped_steps"),
)
"""Memory, speed, and when to give up; not precision, moments, loss scale and delayed updates, which change results."""


@dataclass(frozen=True)
class StageRecord:
    """What a stage tells the next one, and the final table."""

    stage: str
    template: str
    """Fingerprint of tokenizer and chat template: models of one pipeline must agree on it."""
    pad_id: int
    score_mean: float | None = None
    """Of a model with a scalar head: mean of what it says of held-out responses."""
    score_std: float | None = None
    """The standard deviation of the same."""
    before: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before training."""
    after: dict[str, float] = field(default_factory=dict)
    """The same metrics after it."""
    merged: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of models with adapters, by name: the fields of `model_folders.Merge`; beside a model, only its own."""
    files: Seal = field(default_factory=dict)
    """Sizes and checksums of the files that belong to it, which `check_seal` compares."""


def write_record(record: StageRecord, folder: Path, *, files: Iterable[Path] = ()) -> None:
    """Write `stage.json`, with checksums of itself and of `files` in `folder`, whole or not at all."""
    content = asdict(replace(record, files=seal(files, root=folder)))
    write_text(folder / RECORD, json.dumps({**content, _CHECKSUM: _digest_of(content)}, indent=2))


def read_record(folder: Path) -> StageRecord | None:
    """The record in `folder`, or None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    mend = f"Bring it back from a copy, or remove {folder} to make it again."
    content = read_json(path, mend=mend)
    checksum = content.pop(_CHECKSUM, None)
    names = {entry.name for entry in fields(StageRecord)}
    if not {"stage", "template", "pad_id"} <= content.keys() <= names:
        raise ValueError(f"{path} is no record of a stage: found {sorted(content)}, expected {sorted(names)}. {mend}")
    if checksum is not None and checksum != _digest_of(content):
        raise ValueError(f"{path} is damaged: its content is not what was written. {mend}")
    return StageRecord(**content)


def check_seal(folder: Path, *, made_in: Path | None = None, is_needed: bool = True) -> None:
    """The files in `folder` are those that its record was written with, and so are those of the records among them.

    Every byte is read, about a gigabyte in a second on each core.

    Args:
        folder: that of a model, or of a finished stage.
        made_in: the folder of the stage, for a model whose record is one of its files.
        is_needed: False only says which files are gone, as where somebody made room on the disk.

    Raises:
        ValueError: which file is missing or damaged, and what to do.
    """
    record = read_record(folder)
    if record is None:
        return
    if not record.files:
        log.info("%s was written by an earlier version, without checksums: its files are used unchecked", folder)
    files = record.files
    if not is_needed:
        files = {name: entry for name, entry in files.items() if (folder / name).is_file()}
        gone = [str(folder / name) for name in record.files if name not in files]
        if gone:
            log.warning("%s gone since the stage was finished; nothing that runs now reads it", ", ".join(gone))
    nbytes = sum(entry["size"] for entry in files.values())
    if nbytes > _LONG:
        log.info("%s: comparing %.0f GB with their checksums", folder, nbytes / 1e9)
    broken = broken_seal(folder, files)
    models = [(folder / name).parent for name in files if Path(name).name == RECORD]
    if broken:
        stage = folder if models else made_in
        other = f"{stage} to make it again" if stage else f"{folder / RECORD} to use the model as it is now"
        raise ValueError(f"{broken}. Bring it back from a copy, or remove {other}.")
    for model in models:
        check_seal(model, made_in=folder, is_needed=is_needed)


def model_files(folder: Path) -> list[Path]:
    """What belongs to the model in `folder`; notes that people add do not."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in found if path.name != RECORD and path.suffix != ".md"]


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def settings_of(run: RunConfig, stage: str) -> dict[str, Any]:
    """Every setting that the results of `stage` depend on, by dotted name, and which earlier stages it builds on."""
    plain = as_plain(run)
    parts = {stage: plain[stage], "model": plain["model"], "data": {stage: plain["data"][stage]}}
    parts["data"] |= {name: plain["data"][name] for name in ("stage_split", "split_seed")}
    flat = {name: value for name, value in _flat(parts, "").items() if not _is_free(name)}
    here = run.output_dir  # not part of the settings: a folder may be moved
    flat = {name: value.replace(here, "OUTPUT") if isinstance(value, str) else value for name, value in flat.items()}
    makers = [maker for maker in FOLDERS if any(str(value).startswith(f"OUTPUT/{maker}/") for value in flat.values())]
    return flat | {f"{stage} is made from {maker}": _digest(Path(here) / maker / CONFIG) for maker in makers}


def _digest(path: Path) -> str | None:
    """Short hash of the settings that an earlier stage was made from, None while it has not been made."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else None


def _is_free(name: str) -> bool:
    *group, setting = name.split(".")
    in_engine = len(group) == 2 and group[1].endswith("engine")
    return name.partition(".")[2] in _FREE or setting in _FREE_SUFFIXES or (in_engine and setting in _FREE_IN_ENGINES)


def _flat(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def check_folder(run: RunConfig, stage: str) -> None:
    """Refuse a folder that holds results of other settings, or a finished stage that is not what it was.

    Raises:
        ValueError: which settings differ or which file is damaged, and what to do.
    """
    folder = Path(run.folder(stage))
    if is_finished(run, stage):
        check_seal(folder, is_needed=False)
    has_steps = Journal(folder / "metrics.jsonl").count() > 1
    has_results = is_finished(run, stage) or has_steps or bool(steps_in(folder / CHECKPOINTS))
    if not has_results:
        return
    mend = f"Bring it back from a copy, choose another output_dir=, or remove {folder} to make it again."
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder / CONFIG} is missing, which says how the results there were made. {mend}")
    found, expected = read_json(folder / CONFIG, mend=mend), settings_of(run, stage)
    differing = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    if differing:
        changes = "; ".join(f"{name}: there {found.get(name)!r}, now {expected.get(name)!r}" for name in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(
            f"{folder} holds a run of other settings ({changes}{more}). "
            f"Choose another name={run.name}-2 or output_dir=, set the settings back, or remove the folder."
        )


def claim_folder(run: RunConfig, stage: str) -> None:
    """Say in the stage's folder which settings it is made from."""
    write_text(Path(run.folder(stage)) / CONFIG, json.dumps(settings_of(run, stage), indent=2))


def lock_folder(run: RunConfig) -> IO[bytes]:
    """Keep other runs out of the output folder for as long as the returned file is open.

    Raises:
        ValueError: another run is in it, or it cannot be written.
    """
    folder = Path(run.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("ab")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"output_dir={folder}: another run is using it. Wait for it, or choose another.") from error
    except OSError as error:
        raise ValueError(f"output_dir={folder}: cannot be written ({error}). Choose another.") from error
    return lock


def check_shared(run: RunConfig) -> None:
    """Make sure that every rank sees the output folder that the first one has locked; all ranks must call.

    Raises:
        ValueError: some are on machines that do not share it.
    """
    barrier()  # it is there by now
    sees = gather_objects((Path(run.output_dir) / LOCK).exists())
    blind = [str(rank) for rank, found in enumerate(sees) if not found]
    if blind:
        raise ValueError(
            f"output_dir={run.output_dir}: ranks {', '.join(blind)} do not see what rank 0 wrote there. The machines "
            "of a run pass models and checkpoints through it: name a folder on a file system that all of them share."
        )


def is_finished(run: RunConfig, stage: str) -> bool:
    """True when the stage's folder is complete."""
    return (Path(run.folder(stage)) / RECORD).exists()
