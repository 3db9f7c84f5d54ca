"""A stage's folder of checkpoints: each complete or absent, saved during training, loaded on any number of ranks.

All ranks write into `step-000120.partial`. When every rank's file is on the disk, the first rank adds `checkpoint.json`
and renames the folder to `step-000120`. Anything else in there is left over from a killed run, and is removed.
With several machines the folder must be on a file system that they share.

A save only copies what is in memory; a thread writes the copy, and a later `finish_save` makes the checkpoint count.
States on disk are read and written one tensor at a time before `save` returns. All methods must be called by all ranks
together, except properties and `close`; the thread never talks to other ranks.

The files are our own because those of `torch.distributed.checkpoint` are read by unpickling.
See also: what is saved, and when (`stages/lifecycle/checkpointing.py`).
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.engine.checkpoint.checkpoint_files import (
    ShardEntry,
    ShardWriter,
    TensorEntry,
    dtype_name,
    file_of,
    read_index,
    read_shard,
    require_files,
    sync_folder,
    write_index,
)
from rlhf.engine.checkpoint.checkpoint_state import CheckpointTensor, keys_to_write, random_state, set_random_state
from rlhf.runtime.dist import World, agreed, barrier, broadcast_object, gather_objects
from rlhf.runtime.errors import RunError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = re.compile(r"step-\d{6,}\.(partial|removed)")


class SavedCheckpoint(NamedTuple):
    """A complete checkpoint, as `checkpoint.json` describes it; its tensors are still on the disk."""

    folder: Path
    step: int
    state: dict[str, Any]  # what was saved besides tensors
    random: list[dict[str, Any]]  # every rank's random numbers
    tensors: dict[str, TensorEntry]


@dataclass
class _PendingSave:
    """A checkpoint that is being written."""

    step: int
    writer: ShardWriter
    content: dict[str, Any]  # of `checkpoint.json`; the shards are added when all are written
    protected: set[int]


@dataclass
class Checkpoints:
    """A folder of checkpoints."""

    folder: Path
    world: World
    keep: int
    """How many of the newest ones are kept."""
    asynchronous: bool
    """Write in a thread."""
    _pending: _PendingSave | None = field(default=None, init=False)

    @property
    def is_busy(self) -> bool:
        """Whether this rank is still writing a checkpoint."""
        return self._pending is not None and self._pending.writer.is_busy

    def remove_unfinished(self) -> None:
        """Remove the checkpoints that a killed run left half written or half removed."""
        if self.world.is_main and self.folder.exists():
            for path in self.folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    shutil.rmtree(path)
        barrier()  # no rank may write a new one before the old ones are gone

    def newest(self) -> SavedCheckpoint | None:
        """The newest complete checkpoint, the same on all ranks; None when there is none.

        Raises:
            ValueError: it is damaged.
        """
        # One rank lists the folder: on a shared file system, others may see a rename later.
        step = broadcast_object(max(steps_in(self.folder), default=-1))
        return None if step < 0 else open_checkpoint(self.folder, step)

    def check_space(self, nbytes: int, *, count: int) -> None:
        """Refuse to start a stage whose checkpoints would not fit on the disk.

        Raises:
            ValueError: `count` checkpoints of `nbytes` do not fit below the folder, beside what is there.
        """
        present = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free, expected = shutil.disk_usage(existing).free, nbytes * count - present
        if free < expected:
            raise ValueError(
                f"{self.folder}: found {free / 1e9:.2f} GB free, expected {expected / 1e9:.2f} GB for checkpoints "
                f"({count} x {nbytes / 1e9:.2f} GB, one of them while it is written). Free some, choose another "
                f"output_dir=, lower checkpoint.keep, set checkpoint.best=false, or checkpoint.every=0 to save none."
            )

    def save(
        self, step: int, tensors: Iterable[CheckpointTensor], *, state: dict[str, Any], protected: set[int]
    ) -> None:
        """Save the state after `step`; when this returns, training may change it.

        Args:
            step: steps taken.
            tensors: everything that is trained, under different keys; on all ranks the same keys.
            state: all other state, as JSON; the first rank's is written. Every rank's random numbers are added.
            protected: steps of older checkpoints that are kept whatever their age.

        Raises:
            RunError: a checkpoint could not be written, this one or the one before.
        """
        self.finish_save()  # one at a time: each holds a copy of the state in host memory
        held = _by_key(tensors)
        mine = [held[key] for key in keys_to_write(held, rank=self.world.rank)]  # a collective
        writer = ShardWriter(self._partial(step), mine, rank=self.world.rank)
        with agreed() as outcome:
            for tensor in mine:
                # A state on disk is written at once: a copy for the thread would need the memory it was offloaded from.
                later = self.asynchronous and tensor.in_memory
                (writer.stage if later else writer.write)(tensor, tensor.read())
        if outcome.error:
            raise RunError(f"the checkpoint of step {step} could not be made: {outcome.error}") from outcome.cause
        entries: dict[str, TensorEntry] = {
            tensor.key: {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "shards": []}
            for tensor in held.values()
        }
        random = gather_objects(random_state(self.world.device))  # a collective; now, before training draws more
        content = {"step": step, "state": state, "random": random, "tensors": entries}
        self._pending = _PendingSave(step, writer, content, protected)
        # Lifetime: from here on the thread owns the writer and what was staged, until `finish_save` or `close`.
        writer.begin()
        if not self.asynchronous:
            self.finish_save()

    def finish_save(self) -> None:
        """Wait until the pending save is on every rank's disk, and make it count.

        Raises:
            RunError: some rank could not write; older checkpoints are as they were.
        """
        if self._pending is None:  # on all ranks alike
            return
        pending, self._pending = self._pending, None
        pending.writer.wait()  # joins the thread: its results may be read
        # A collective, and the point from which every rank's bytes are on the disk.
        found = gather_objects((pending.writer.error, pending.writer.entries))
        errors = [error for error, _ in found if error]
        if self.world.is_main and not errors:
            errors = self._publish(pending, [entries for _, entries in found])
        errors = broadcast_object(errors)  # those of the first rank's rename, too; nobody continues before it
        if errors:
            self._give_up(pending, errors)

    def load(self, saved: SavedCheckpoint, tensors: Iterable[CheckpointTensor]) -> None:
        """Set `tensors` and this rank's random numbers to what was saved, on any number of ranks.

        A rank that did not exist then continues with the random numbers of the first.

        Raises:
            ValueError: a file is missing or damaged, or the tensors are not those that were saved.
        """
        held = _by_key(tensors)
        _require_same(saved, held)
        with agreed() as outcome:
            for tensor in held.values():  # in the order of the files, where the number of ranks is the same
                if tensor.rows:
                    tensor.write(read_shard(tensor, saved.tensors[tensor.key], folder=saved.folder))
        if outcome.error:
            raise _damaged(saved.folder, outcome.error) from outcome.cause
        # Last, so that nothing draws before training continues.
        rank = self.world.rank if self.world.rank < len(saved.random) else 0
        set_random_state(saved.random[rank], self.world.device)

    def remove(self) -> None:
        """Remove all checkpoints."""
        assert self._pending is None, "finish_save first"
        if self.world.is_main:
            self._remove(steps_in(self.folder))
            if self.folder.exists() and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def close(self) -> None:
        """Stop writing; an unfinished save never counts. One rank may call it alone, also after an error."""
        if self._pending is not None:
            self._pending.writer.cancel()

    def _publish(self, pending: _PendingSave, entries_of_ranks: list[dict[str, ShardEntry]]) -> list[str]:
        """On the first rank: rename the folder, which makes the checkpoint count; returns what went wrong."""
        folder, final = self._partial(pending.step), folder_of(self.folder, pending.step)
        for entries in entries_of_ranks:
            for key, entry in entries.items():
                pending.content["tensors"][key]["shards"].append(entry)
        missing = [name for name in map(file_of, range(len(entries_of_ranks))) if not (folder / name).exists()]
        if missing:
            return [f"{folder}: {', '.join(missing)} are on other machines; output_dir must be shared by all of them"]
        try:
            write_index(folder, pending.content)  # synced before the rename: a crash leaves all of it or none
            folder.rename(final)
            sync_folder(self.folder)  # the older ones go only when the new one cannot be lost any more
            self._remove(set(steps_in(self.folder)[: -self.keep]) - pending.protected)
        except OSError as error:
            return [f"{folder}: {error.strerror}"]
        return []

    def _give_up(self, pending: _PendingSave, errors: list[str]) -> None:
        if self.world.is_main:  # no rank writes any more: `finish_save` has waited for all of them
            shutil.rmtree(self._partial(pending.step), ignore_errors=True)
        older = broadcast_object(max(steps_in(self.folder), default=-1))
        remaining = (
            f"{folder_of(self.folder, older)} is unchanged: the same command continues from it" if older >= 0 else ""
        )
        raise RunError(
            f"the checkpoint of step {pending.step} could not be written: {errors[0]}. "
            f"{remaining or 'There is no older one'}. Make room, or set checkpoint.every=0 to save none."
        )

    def _remove(self, steps: Iterable[int]) -> None:
        for step in steps:
            complete = folder_of(self.folder, step)
            going = complete.with_suffix(".removed")  # one that is half removed must not look complete
            complete.rename(going)
            shutil.rmtree(going)  # may be cut short by a kill; `remove_unfinished` removes the rest

    def _partial(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.partial"


def open_checkpoint(folder: Path, step: int) -> SavedCheckpoint:
    """The complete checkpoint of `step`.

    Raises:
        ValueError: its `checkpoint.json` is damaged, or a file is missing or too short.
    """
    complete = folder_of(folder, step)
    try:
        saved = SavedCheckpoint(complete, **read_index(complete))
        require_files(complete, saved.tensors)
        return saved
    except ValueError as error:
        raise _damaged(complete, error) from error


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, the oldest first."""
    # By name alone: a folder gets this name when it is complete, and loses it before anything in it is removed.
    names = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name[1]) for name in names if name)


def folder_of(folder: Path, step: int) -> Path:
    """Where the complete checkpoint of `step` is, if there is one."""
    return folder / f"step-{step:06d}"


def _damaged(folder: Path, reason: object) -> ValueError:
    return ValueError(
        f"the checkpoint {folder} cannot be used: {reason}. Remove that folder to continue from an older checkpoint, "
        f"or from the start of the stage where there is none."
    )


def _by_key(tensors: Iterable[CheckpointTensor]) -> dict[str, CheckpointTensor]:
    """The tensors that have elements on some rank."""
    return {tensor.key: tensor for tensor in tensors if 0 not in tensor.shape}


def _require_same(saved: SavedCheckpoint, held: dict[str, CheckpointTensor]) -> None:
    found, differing = saved.tensors, []
    for key in sorted({*found, *held}):
        if key not in held:
            differing.append(f"{key} is not trained here")
        elif key not in found:
            differing.append(f"{key} was not saved")
        elif found[key]["shape"] != list(held[key].shape):
            differing.append(f"{key} was {found[key]['shape']}, is {list(held[key].shape)}")
        elif found[key]["dtype"] != dtype_name(held[key].dtype):
            differing.append(f"{key} was {found[key]['dtype']}, is {dtype_name(held[key].dtype)}")
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"the checkpoint {saved.folder} is of another model ({'; '.join(differing[:3])}{more}). "
            f"Use the model and lora settings of the saved run, or remove that folder to start anew."
        )
