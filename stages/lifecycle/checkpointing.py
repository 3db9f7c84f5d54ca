"""When a stage saves checkpoints, what they hold, and how it resumes from them; signals that stop it after a step.

A checkpoint holds everything that the rest of the stage depends on: trained models with optimizer state and counters,
the KL controller, the position in the data, every rank's random number generators, and the evaluations so far. Frozen
models are not saved, but for a reference that follows the actor. The same command resumes from the newest checkpoint:
bit for bit on the same number of ranks, and up to rounding on another number of ranks, ZeRO stage or offload device.

A finished stage has exported the models of its best evaluation, and removes its checkpoints.
See also: `launch.py`, which passes signals on to the ranks.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from rlhf.config.run_config import CheckpointConfig
from rlhf.config.stage_configs import BestMetric
from rlhf.engine.checkpoint.checkpoint_state import CheckpointTensor
from rlhf.engine.checkpoint.checkpoints import Checkpoints, SavedCheckpoint, folder_of, open_checkpoint, steps_in
from rlhf.engine.engine import Engine
from rlhf.runtime.dist import World, broadcast_object, max_over_ranks
from rlhf.runtime.errors import RunError

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_NOTICE = b"\nstopping after this step; a second signal stops at once, without a checkpoint\n"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stateful(Protocol):
    """A small object whose state changes while a stage runs."""

    def state_dict(self) -> dict[str, Any]:
        """Its state, as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


@dataclass(frozen=True)
class TrainingState:
    """Everything that a checkpoint of a stage holds."""

    engines: Mapping[str, Engine]
    """The models that are trained."""
    others: Mapping[str, Stateful]
    """Everything else that changes: loader, KL controller, tracker."""
    data: str
    """Fingerprint of the training rows."""
    frozen: Mapping[str, Engine] = field(default_factory=dict)
    """Models that no optimizer trains and that change all the same: a reference that follows the actor."""

    def tensors(self) -> list[CheckpointTensor]:
        """Parameters and optimizer states of all engines, by name."""
        engines = {**self.engines, **self.frozen}
        return [tensor.under(name) for name, engine in engines.items() for tensor in engine.checkpoint_tensors()]

    def state_dict(self) -> dict[str, Any]:
        """Everything that is no tensor, as JSON values."""
        return {
            "data": self.data,
            "dtypes": {name: str(engine.dtype) for name, engine in {**self.engines, **self.frozen}.items()},
            "engines": {name: engine.counters() for name, engine in self.engines.items()},
            "others": {name: part.state_dict() for name, part in self.others.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, engine in self.engines.items():
            engine.load_counters(state["engines"][name])
        for name, part in self.others.items():
            part.load_state_dict(state["others"][name])

    def require_same(self, saved: SavedCheckpoint) -> None:
        """Raise ValueError if the checkpoint was made from other data or in another precision."""
        check_data(saved, self.data)
        found, expected = saved.state["dtypes"], self.state_dict()["dtypes"]
        if found != expected:
            raise ValueError(
                f"the checkpoint {saved.folder} was trained with working weights in {found}, here they are in "
                f"{expected}. Set engine.precision to go on as before, or remove that folder to start anew."
            )


def check_data(saved: SavedCheckpoint, fingerprint: str) -> None:
    """Check that the checkpoint was made from these rows.

    Raises:
        ValueError: the data have changed.
    """
    if saved.state["data"] != fingerprint:
        raise ValueError(
            f"the checkpoint {saved.folder} was made from other rows than those that the data sets hold now: its "
            f"position means nothing in them. Bring the data back, or remove {saved.folder.parent} to start anew."
        )


@dataclass
class TrainingProgress:
    """How far a stage has come, and its evaluations so far."""

    step: int = 0
    before: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before training."""
    after: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the last evaluation."""
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the best evaluation after a step, empty if there was none."""

    def note(self, step: int, evaluation: dict[str, float], *, metric: BestMetric) -> bool:
        """Record an evaluation after `step` (empty: there was none); True if it is the best so far."""
        self.after = evaluation or self.after
        value = metric.sign * evaluation.get(metric.metric, math.nan)
        if not math.isfinite(value) or (self.best and value <= metric.sign * self.best[metric.metric]):
            return False
        self.best_step, self.best = step, evaluation
        return True


class Stopped(KeyboardInterrupt):
    """The run was interrupted and has saved a checkpoint; raised on all ranks alike."""


class GracefulStop:
    """Between `listen` and `release`, the first SIGTERM or SIGINT only sets `asked`; a second one ends the process."""

    def __init__(self, *, prints: bool) -> None:
        """With `prints`, a signal is acknowledged on stderr."""
        self.asked = False
        self._prints = prints
        self._earlier: dict[int, Any] = {}

    def listen(self) -> None:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():  # python allows no other to handle signals
            self._earlier = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def release(self) -> None:
        """Restore the earlier handlers."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True
        if self._prints:
            os.write(2, _NOTICE)


@dataclass
class CheckpointManager:
    """Saves a stage when a checkpoint is due, and restores it."""

    checkpoints: Checkpoints
    config: CheckpointConfig
    metric: BestMetric
    total_steps: int
    world: World
    state: TrainingState
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    saved_step: int = -1
    """Step of the newest checkpoint on disk or being written."""

    @classmethod
    def of(
        cls,
        folder: Path,
        config: CheckpointConfig,
        *,
        metric: BestMetric,
        total_steps: int,
        state: TrainingState,
        tracker: Stateful,
    ) -> CheckpointManager:
        """The manager for the stage in `folder`; its checkpoints also hold how many rows `tracker` has written."""
        world = next(iter(state.engines.values())).world
        checkpoints = Checkpoints(folder / CHECKPOINTS, world, keep=config.keep, asynchronous=config.asynchronous)
        counted = replace(state, others={**state.others, "tracker": tracker})
        return cls(checkpoints, config, metric, total_steps, world, counted)

    def resume(self) -> bool:
        """Restore the newest checkpoint; False if there is none. Also checks that the next ones will fit on the disk.

        Raises:
            RunError: the checkpoint is damaged or of another model, or the disk has too little space for more.
        """
        try:
            return self._resume()
        except ValueError as error:
            raise RunError(str(error)) from error

    def _resume(self) -> bool:
        self.checkpoints.remove_unfinished()
        if self.config.interval_of(self.total_steps):
            size = sum(stored.nbytes for stored in self.state.tensors())
            self.checkpoints.check_space(size, count=self.config.keep + 1 + self.config.best)
        saved = self.checkpoints.newest()
        if saved is None:
            return False
        self.state.require_same(saved)
        self.checkpoints.load(saved, self.state.tensors())
        self.state.load_state_dict(saved.state)
        self.progress = TrainingProgress(**saved.state["progress"])
        self.saved_step = saved.step
        log.info("resuming after step %s of %s (%s)", saved.step, self.total_steps, saved.folder)
        return True

    def after_step(self, step: int, evaluation: dict[str, float], *, stop: bool) -> None:
        """Save if a checkpoint is due; all ranks must call it after every step.

        Args:
            step: steps taken.
            evaluation: held-out metrics, empty if there was no evaluation.
            stop: whether this rank has received a signal.

        Raises:
            Stopped: some rank has received one, and a checkpoint was saved.
            RunError: a checkpoint could not be written.
        """
        self.progress.step = step
        is_best = self.progress.note(step, evaluation, metric=self.metric)
        # A collective in every step on every rank: signals, writers and evaluations differ between ranks, and all must
        # save or stop together. .tolist() waits for the result.
        flags = torch.tensor([stop, self.checkpoints.is_busy, is_best], dtype=torch.int32)
        asked, busy, best = max_over_ranks(flags).tolist()
        if not busy:
            self.checkpoints.finish_save()
        if asked or self._is_due(step, is_best=bool(best)):
            self._save(step)
        if asked or step == self.total_steps:
            self.checkpoints.finish_save()
        if asked:
            raise Stopped

    def return_to_best(self) -> bool:
        """After the last step: restore the models of the best evaluation, if it was an earlier one and was kept.

        Raises:
            ValueError: the checkpoint is damaged.
        """
        there = broadcast_object(steps_in(self.checkpoints.folder))
        step = self.progress.best_step
        if not self.config.best or step == self.total_steps or step not in there:
            return False
        self.checkpoints.load(open_checkpoint(self.checkpoints.folder, step), self.state.tensors())
        return True

    def finish(self) -> None:
        """Remove the checkpoints of a finished stage."""
        self.checkpoints.remove()

    def _is_due(self, step: int, *, is_best: bool) -> bool:
        interval = self.config.interval_of(self.total_steps)
        wanted = interval > 0 and (step % interval == 0 or (is_best and self.config.best))
        return wanted and step < self.total_steps  # the last step is followed by the export

    def _save(self, step: int) -> None:
        if step == self.saved_step:
            return
        state = self.state.state_dict() | {"progress": asdict(self.progress)}
        protected = {self.progress.best_step} if self.config.best else set()
        self.checkpoints.save(step, self.state.tensors(), state=state, protected=protected)
        self.saved_step = step


def newest_in(folder: Path) -> Path | None:
    """Path of the newest complete checkpoint of the stage in `folder`, or None; not a collective."""
    steps = steps_in(folder / CHECKPOINTS)
    return folder_of(folder / CHECKPOINTS, steps[-1]) if steps else None


def remove_checkpoints(folder: Path) -> None:
    """Remove checkpoints that a finished stage has left in `folder` because it was killed at the very end."""
    if (folder / CHECKPOINTS).exists():
        shutil.rmtree(folder / CHECKPOINTS)


def check_resume(folder: Path, *, data: str) -> None:
    """Check before anything is loaded that the newest checkpoint in `folder` was made from these rows.

    Raises:
        ValueError: it was not, or it is damaged.
    """
    steps = steps_in(folder / CHECKPOINTS)
    if steps:
        check_data(open_checkpoint(folder / CHECKPOINTS, steps[-1]), data)
