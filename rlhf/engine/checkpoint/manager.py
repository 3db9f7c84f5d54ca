"""The checkpoints of a stage: saved while it trains, complete or absent, and loaded on any number of ranks.

All ranks write into `step-000120.partial`; when everybody's bytes are on the disk, the first rank adds the table of
contents and renames the folder to `step-000120`. Whatever else is there is left over from a kill, and is removed.
With several machines the folder must be on a file system that they share.

A save only copies what is in memory; a thread writes the copy, and a later call of `settle` makes the checkpoint count.
What rests on disk is read and written a tensor at a time before `save` returns. All methods but the properties are for
all ranks together, and no thread ever talks to another rank.
Left out: what is saved, and when (`stages/lifecycle/checkpointing.py`).
"""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from rlhf.engine.checkpoint.planners import Loading, Saving
from rlhf.engine.checkpoint.rng_state import random_state, set_random_state
from rlhf.engine.checkpoint.storage import Reader, Writer, contents
from rlhf.engine.checkpoint.stored_state import Stored
from rlhf.engine.checkpoint.writer import Writing, file_of, read_index, require_files, sync_folder, write_index
from rlhf.runtime.dist import World, barrier, broadcast_object, gather_objects
from rlhf.runtime.errors import RunError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = re.compile(r"step-\d{6,}\.(partial|removed)")


class Saved(NamedTuple):
    """A checkpoint, without its tensors."""

    step: int
    folder: Path
    content: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """What was saved beside the tensors."""
        state: dict[str, Any] = self.content["state"]
        return state


@dataclass
class _Pending:
    """A checkpoint on its way to the disk."""

    step: int
    writing: Writing
    content: dict[str, Any]
    spare: set[int]


@dataclass
class Checkpoints:
    """A folder of checkpoints."""

    folder: Path
    world: World
    keep: int
    """Newest ones that are kept."""
    asynchronous: bool
    """Write in a thread."""
    _pending: _Pending | None = field(default=None, init=False)

    @property
    def is_busy(self) -> bool:
        """Whether this rank is still writing it."""
        return self._pending is not None and self._pending.writing.is_busy

    def tidy(self) -> None:
        """Remove what a killed run has left half written or half removed."""
        if self.world.is_main and self.folder.exists():
            for path in self.folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    shutil.rmtree(path)
        barrier()  # nobody writes before this is done

    def newest(self) -> Saved | None:
        """The newest complete checkpoint; None when there is none.

        Raises:
            ValueError: it is damaged.
        """
        step = broadcast_object(max(steps_in(self.folder), default=-1))
        return None if step < 0 else open_saved(self.folder, step)

    def check_space(self, nbytes: int, *, count: int) -> None:
        """Refuse to start what could not be saved.

        Raises:
            ValueError: `count` checkpoints of `nbytes` do not fit below the folder, beside what is there.
        """
        present = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        free, expected = _free_bytes(self.folder), nbytes * count - present
        if free < expected:
            raise ValueError(
                f"{self.folder}: found {free / 1e9:.2f} GB free, expected {expected / 1e9:.2f} GB for checkpoints "
                f"({count} x {nbytes / 1e9:.2f} GB, one of them while it is written). Free some, choose another "
                f"output_dir=, lower checkpoint.keep, set checkpoint.best=false, or checkpoint.every=0 to save none."
            )

    def save(self, step: int, tensors: Iterable[Stored], *, state: dict[str, Any], spare: set[int]) -> None:
        """Save the state after `step`; returns when training may change it.

        Args:
            step: steps taken.
            tensors: everything that learns, under different keys; on all ranks the same keys.
            state: JSON of everything else; the first rank's is written. Random numbers are added, each rank's.
            spare: steps of older checkpoints that are kept whatever their age.

        Raises:
            RunError: a checkpoint could not be written, this one or the one before.
        """
        self.settle()
        held = _by_key(tensors)
        writing = Writing(self._partial(step) / file_of(self.world.rank))
        writer = Writer(writing, held, rank=self.world.rank, asynchronous=self.asynchronous)
        with _agreed() as said, _without_warnings():
            dcp.save(held, storage_writer=writer, planner=Saving(self.world.rank), no_dist=True)
        if said.error:
            raise RunError(f"the checkpoint of step {step} could not be made: {said.error}") from said.cause
        writing.begin(asynchronous=self.asynchronous)
        random, parts = gather_objects(random_state(self.world.device)), gather_objects(writer.parts)
        content = {"step": step, "state": state, "random": random, "tensors": contents(held, parts)}
        self._pending = _Pending(step, writing, content, spare)
        if not self.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Wait until what was saved is on every rank's disk, and make it count.

        Raises:
            RunError: some rank could not write; older checkpoints are as they were.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.writing.wait()
        errors = [error for error in gather_objects(pending.writing.error) if error]
        checksums = gather_objects(pending.writing.checksums)
        if self.world.is_main and not errors:
            errors = self._publish(pending, checksums)
        errors = broadcast_object(errors)
        if errors:
            self._give_up(pending, errors)

    def load(self, saved: Saved, tensors: Iterable[Stored]) -> None:
        """Set `tensors` and this rank's random numbers to what was saved, on any number of ranks.

        A rank that did not exist then goes on with the random numbers of the first.

        Raises:
            ValueError: a file is missing or damaged, or the tensors are not those that were saved.
        """
        held = _by_key(tensors)
        _require_same(saved, held)
        planner, reader = Loading(), Reader(saved.folder, saved.content["tensors"])
        with _agreed() as said, _without_warnings():
            dcp.load(held, storage_reader=reader, planner=planner, no_dist=True)
            planner.require_complete()
        if said.error:
            raise _damaged(saved.folder, said.error) from said.cause
        random = saved.content["random"]
        set_random_state(random[self.world.rank if self.world.rank < len(random) else 0], self.world.device)

    def remove(self) -> None:
        """Remove all checkpoints."""
        assert self._pending is None, "settle first"
        if self.world.is_main:
            self._remove(steps_in(self.folder))
            if self.folder.exists() and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def close(self) -> None:
        """Stop writing; what does not count by now never will. For one rank alone, also after an error."""
        if self._pending is not None:
            self._pending.writing.cancel()

    def _publish(self, pending: _Pending, checksums: list[dict[int, list[int]]]) -> list[str]:
        """On the first rank: the rename that makes it count; returns what went wrong."""
        folder, final = self._partial(pending.step), folder_of(self.folder, pending.step)
        for entry in pending.content["tensors"].values():
            for part in entry["parts"]:
                part["checksums"] = checksums[part["file"]][part["start"]]
        missing = [name for name in map(file_of, range(len(checksums))) if not (folder / name).exists()]
        if missing:
            return [f"{folder}: {', '.join(missing)} are on other machines; output_dir must be shared by all of them"]
        try:
            write_index(folder, pending.content)
            folder.rename(final)
            sync_folder(self.folder)
            self._remove(set(steps_in(self.folder)[: -self.keep]) - pending.spare)
        except OSError as error:
            return [f"{folder}: {error.strerror}"]
        return []

    def _give_up(self, pending: _Pending, errors: list[str]) -> None:
        if self.world.is_main:
            shutil.rmtree(self._partial(pending.step), ignore_errors=True)
        older = broadcast_object(max(steps_in(self.folder), default=-1))
        rest = f"{folder_of(self.folder, older)} is as it was: the same command goes on from it" if older >= 0 else ""
        raise RunError(
            f"the checkpoint of step {pending.step} could not be written: {errors[0]}. "
            f"{rest or 'There is no older one'}. Make room, or set checkpoint.every=0 to save none."
        )

    def _remove(self, steps: Iterable[int]) -> None:
        for step in steps:
            complete = folder_of(self.folder, step)
            going = complete.with_suffix(".removed")  # what is half removed must not look complete
            complete.rename(going)
            shutil.rmtree(going)

    def _partial(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.partial"


def open_saved(folder: Path, step: int) -> Saved:
    """The complete checkpoint of `step`.

    Raises:
        ValueError: its table of contents is damaged, or a file is missing or too short.
    """
    complete = folder_of(folder, step)
    try:
        saved = Saved(step, complete, read_index(complete))
        require_files(complete, saved.content["tensors"])
        return saved
    except ValueError as error:
        raise _damaged(complete, error) from error


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, the oldest first."""
    names = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name[1]) for name in names if name)


def folder_of(folder: Path, step: int) -> Path:
    """Where the complete checkpoint of `step` is, if there is one."""
    return folder / f"step-{step:06d}"


def _damaged(folder: Path, reason: object) -> ValueError:
    return ValueError(
        f"the checkpoint {folder} cannot be used: {reason}. Remove that folder to go on from an older checkpoint, "
        f"or from the start of the stage where there is none."
    )


def _by_key(tensors: Iterable[Stored]) -> dict[str, Stored]:
    """Those that hold anything at all."""
    return {stored.key: stored for stored in tensors if 0 not in stored.shape}


def _require_same(saved: Saved, held: dict[str, Stored]) -> None:
    found, differing = saved.content["tensors"], []
    for key in sorted({*found, *held}):
        if key not in held:
            differing.append(f"{key} does not learn here")
        elif key not in found:
            differing.append(f"{key} was not saved")
        elif found[key]["shape"] != list(held[key].shape):
            differing.append(f"{key} was {found[key]['shape']}, is {list(held[key].shape)}")
        elif found[key]["dtype"] != str(held[key].dtype).removeprefix("torch."):
            differing.append(f"{key} was {found[key]['dtype']}, is {held[key].dtype}")
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"the checkpoint {saved.folder} is of another model ({'; '.join(differing[:3])}{more}). "
            f"Use the model and lora settings of the saved run, or remove that folder to start anew."
        )


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


@dataclass
class _Agreement:
    error: str = ""
    cause: Exception | None = None
    """On the rank that failed."""


@contextmanager
def _agreed() -> Iterator[_Agreement]:
    """Catch what goes wrong inside; afterwards `error` holds it on every rank, whichever failed."""
    agreement = _Agreement()
    try:
        yield agreement
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
        agreement.error, agreement.cause = str(failure) or type(failure).__name__, error
    except ValueError as error:
        agreement.error, agreement.cause = str(error), error
    agreement.error = next(filter(None, gather_objects(agreement.error)), "")


def _without_warnings() -> warnings.catch_warnings[None]:
    """`no_dist` is meant, and needs no warning."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
