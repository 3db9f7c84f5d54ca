"""The folder of a stage: the lock, the check of the settings that it was made from, and its record, `stage.json`.

Stages exchange results through folders only. A stage is finished when its folder holds `stage.json`, which is written
last and holds checksums of the files. See also: `stage_settings.py`.
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

from rlhf.config.run_config import RunConfig
from rlhf.engine.checkpoint.checkpoints import steps_in
from rlhf.runtime.atomic_files import Seal, broken_seal, read_json, seal, write_text
from rlhf.tracking.jsonl_log import JsonlLog
from stages.lifecycle.checkpointing import CHECKPOINTS
from stages.lifecycle.stage_settings import CONFIG, settings_of

log = logging.getLogger(__name__)

RECORD = "stage.json"
LOCK = ".lock"
_CHECKSUM = "sha256"
"""Key of the checksum of the record itself."""
_LONG = 4e9
"""Files larger than this many bytes take a while to hash, so that is logged."""


@dataclass(frozen=True)
class StageRecord:
    """The content of `stage.json`: what the next stage and the final table need to know."""

    stage: str
    template: str
    """Fingerprint of tokenizer and chat template: models of one pipeline must agree on it."""
    pad_id: int
    score_mean: float | None = None
    """Mean output of a scalar head over held-out responses."""
    score_std: float | None = None
    """Standard deviation of the same outputs."""
    before: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before training."""
    after: dict[str, float] = field(default_factory=dict)
    """Held-out metrics after training."""
    merged: dict[str, dict[str, Any]] = field(default_factory=dict)
    """How adapters were merged, by model: the fields of `stage_models.Merge`. A model's own record has only its own."""
    data: dict[str, Any] = field(default_factory=dict)
    """`train` and `held_out` rows, `dropped` ones by the reason, and the `fingerprint` of all tokens."""
    files: Seal = field(default_factory=dict)
    """Sizes and checksums of its files, which `check_seal` compares."""


def write_record(record: StageRecord, folder: Path, *, files: Iterable[Path] = ()) -> None:
    """Write `stage.json`, with checksums of itself and of `files` in `folder`, whole or not at all."""
    content = asdict(replace(record, files=seal(files, root=folder)))
    write_text(folder / RECORD, json.dumps({**content, _CHECKSUM: _digest_of(content)}, indent=2))


def read_record(folder: Path) -> StageRecord | None:
    """The record in `folder`, or None if there is none; raises ValueError if it is damaged."""
    path = folder / RECORD
    if not path.exists():
        return None
    mend = f"Bring it back from a copy, or remove {folder} to make it again."
    content = read_json(path, mend=mend)
    checksum = content.pop(_CHECKSUM, "")
    names = {entry.name for entry in fields(StageRecord)}
    if not {"stage", "template", "pad_id"} <= content.keys() <= names:
        raise ValueError(f"{path} is no record of a stage: found {sorted(content)}, expected {sorted(names)}. {mend}")
    if checksum != _digest_of(content):
        raise ValueError(f"{path} is damaged: its content is not what was written. {mend}")
    return StageRecord(**content)


def check_seal(folder: Path, *, made_in: Path | None = None, is_needed: bool = True) -> None:
    """Compare the files in `folder`, and those of the models inside, with the checksums in their records.

    Every byte is read, about a gigabyte per second and core.

    Args:
        folder: the folder of a model or of a finished stage.
        made_in: the folder of the stage, for a model inside it.
        is_needed: False only warns of files that are gone, for example because somebody freed disk space.

    Raises:
        ValueError: which file is missing or damaged, and what to do.
    """
    record = read_record(folder)
    if record is None:
        return
    files = record.files
    if not is_needed:
        files = {name: entry for name, entry in files.items() if (folder / name).is_file()}
        gone = [str(folder / name) for name in record.files if name not in files]
        if gone:
            log.warning("%s: deleted since the stage finished; nothing in this run reads it", ", ".join(gone))
    nbytes = sum(entry["size"] for entry in files.values())
    if nbytes > _LONG:
        log.info("%s: comparing %.0f GB with its checksums", folder, nbytes / 1e9)
    broken = broken_seal(folder, files)
    models = [(folder / name).parent for name in files if Path(name).name == RECORD]
    if broken:
        stage = folder if models else made_in
        other = f"{stage} to make it again" if stage else f"{folder / RECORD} to use the model as it is now"
        raise ValueError(f"{broken}. Bring it back from a copy, or remove {other}.")
    for model in models:
        check_seal(model, made_in=folder, is_needed=is_needed)


def model_files(folder: Path) -> list[Path]:
    """The files of the model in `folder`, except for notes that people have added."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in found if path.name != RECORD and path.suffix != ".md"]


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_folder(run: RunConfig, stage: str) -> None:
    """Refuse a folder that holds results of other settings, or a finished stage whose files have changed.

    Raises:
        ValueError: which settings differ or which file is damaged, and what to do.
    """
    folder = Path(run.folder(stage))
    if is_finished(run, stage):
        check_seal(folder, is_needed=False)
    has_steps = JsonlLog(folder / "metrics.jsonl").count() > 1
    has_results = is_finished(run, stage) or has_steps or bool(steps_in(folder / CHECKPOINTS))
    if not has_results:
        return
    mend = f"Bring it back from a copy, choose another output_dir=, or remove {folder} to make it again."
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder / CONFIG} is missing; it holds the settings of the results there. {mend}")
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
    """Write the settings of the stage into its folder."""
    write_text(Path(run.folder(stage)) / CONFIG, json.dumps(settings_of(run, stage), indent=2))


def lock_folder(run: RunConfig) -> IO[bytes]:
    """Lock the output folder against other runs, for as long as the returned file stays open.

    Raises:
        ValueError: another run holds the lock, or the folder cannot be written.
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


def is_finished(run: RunConfig, stage: str) -> bool:
    """Whether the stage has finished."""
    return (Path(run.folder(stage)) / RECORD).exists()
