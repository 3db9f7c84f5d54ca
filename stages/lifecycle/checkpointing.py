"""How a stage is saved while it runs, and how it goes on after it was killed.

A checkpoint holds all that the rest of the stage depends on: what learns with its optimizer state and counters, the
KL controller, the position in the data, every rank's random numbers, and the evaluations so far. Frozen models are not
in it. The same command goes on from the newest checkpoint: on the same number of ranks with the same bits, on another
number, ZeRO stage or tier with the same numbers up to rounding.

Checkpoints are there for runs that do not end: a stage that is finished removes them. Of the one with the best
evaluation it leaves the models, where that was not the last.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from rlhf.config.run_config import CheckpointConfig
from rlhf.config.stage_configs import BestMetric
from rlhf.engine.checkpoint.manager import Checkpoints, Saved, folder_of, open_saved, steps_in
from rlhf.engine.checkpoint.stored_state import Stored
from rlhf.engine.engine import Engine
from rlhf.runtime.dist import World, broadcast_object, max_over_ranks
from rlhf.runtime.errors import RunError
from stages.lifecycle.signals import Stopped

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


class Stateful(Protocol):
    """Something small that changes while a stage runs."""

    def state_dict(self) -> dict[str, Any]:
        """Its state as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint of a stage is made of."""

    engines: Mapping[str, Engine]
    """The models that learn."""
    others: Mapping[str, Stateful]
    """Everything else that changes."""
    data: str
    """Fingerprint of the rows that are learnt from."""

    def tensors(self) -> list[Stored]:
        """Everything that learns."""
        return [stored.below(name) for name, engine in self.engines.items() for stored in engine.stored()]

    def state_dict(self) -> dict[str, Any]:
        """The rest, as JSON."""
        return {
            "data": self.data,
            "dtypes": {name: str(engine.dtype) for name, engine in self.engines.items()},
            "engines": {name: engine.counters() for name, engine in self.engines.items()},
            "others": {name: part.state_dict() for name, part in self.others.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        for name, engine in self.engines.items():
            engine.load_counters(state["engines"][name])
        for name, part in self.others.items():
            part.load_state_dict(state["others"][name])

    def require_same(self, saved: Saved) -> None:
        """Raises ValueError where the checkpoint was made from other data, or in another precision."""
        check_data(saved, self.data)
        found, expected = saved.state["dtypes"], self.state_dict()["dtypes"]
        if found != expected:
            raise ValueError(
                f"the checkpoint {saved.folder} was trained with working weights in {found}, here they are in "
                f"{expected}. Set engine.precision to go on as before, or remove that folder to start anew."
            )


def check_data(saved: Saved, fingerprint: str) -> None:
    """The rows are those that the checkpoint was made from.

    Raises:
        ValueError: they have changed.
    """
    if saved.state["data"] != fingerprint:
        raise ValueError(
            f"the checkpoint {saved.folder} was made from other rows than those that the data sets hold now: its "
            f"position means nothing in them. Bring the data back, or remove {saved.folder.parent} to start anew."
        )


@dataclass
class Progress:
    """How far a stage is, and what its evaluations said."""

    step: int = 0
    before: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before training."""
    after: dict[str, float] = field(default_factory=dict)
    """Those of the last evaluation."""
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Those of the best evaluation, if there was one after a step."""

    def note(self, step: int, evaluation: dict[str, float], *, metric: BestMetric) -> bool:
        """Take note of an evaluation after `step`, if there was one; True when it is the best of all."""
        self.after = evaluation or self.after
        value = evaluation.get(metric.metric)
        if (
            value is None
            or not math.isfinite(value)
            or (self.best and metric.sign * value <= metric.sign * self.best[metric.metric])
        ):
            return False
        self.best_step, self.best = step, evaluation
        return True


@dataclass
class CheckpointManager:
    """Saves a stage at the right steps, and takes it back to where it was."""

    checkpoints: Checkpoints
    config: CheckpointConfig
    metric: BestMetric
    total_steps: int
    world: World
    state: TrainingState
    progress: Progress = field(default_factory=Progress)
    saved_step: int = -1
    """Of the newest checkpoint that is on the disk or on its way."""

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
        """The manager of the stage in `folder`, which also has a checkpoint say how many rows `tracker` has written."""
        world = next(iter(state.engines.values())).world
        checkpoints = Checkpoints(folder / CHECKPOINTS, world, keep=config.keep, asynchronous=config.asynchronous)
        counted = replace(state, others={**state.others, "tracker": tracker})
        return cls(checkpoints, config, metric, total_steps, world, counted)

    def resume(self) -> bool:
        """Go on from the newest checkpoint; False when there is none. Refuses to start where none would fit.

        Raises:
            RunError: the checkpoint is damaged, belongs to another model, or there is no room for more.
        """
        try:
            return self._resume()
        except ValueError as error:
            raise RunError(str(error)) from error

    def _resume(self) -> bool:
        self.checkpoints.tidy()
        if self.config.interval_of(self.total_steps):
            size = sum(stored.nbytes for stored in self.state.tensors())
            self.checkpoints.check_space(size, count=self.config.keep + 1 + self.config.best)
        saved = self.checkpoints.newest()
        if saved is None:
            return False
        self.state.require_same(saved)
        self.checkpoints.load(saved, self.state.tensors())
        self.state.load_state_dict(saved.state)
        self.progress = Progress(**saved.state["progress"])
        self.saved_step = saved.step
        log.info("going on after step %s of %s (%s)", saved.step, self.total_steps, saved.folder)
        return True

    def after_step(self, step: int, evaluation: dict[str, float], *, stop: bool) -> None:
        """Save if it is time to; all ranks together.

        Args:
            step: steps taken.
            evaluation: held-out metrics, empty where there was no evaluation.
            stop: this rank was asked to stop.

        Raises:
            Stopped: some rank was, and all have saved themselves.
            RunError: a checkpoint could not be written.
        """
        self.progress.step = step
        is_best = self.progress.note(step, evaluation, metric=self.metric)
        # In every step and on every rank, whether there is something to agree on or not.
        flags = torch.tensor([stop, self.checkpoints.is_busy, is_best], dtype=torch.int32)
        asked, busy, best = max_over_ranks(flags).tolist()
        if not busy:
            self.checkpoints.settle()
        if asked or self._is_due(step) or (best and self._keeps_best(step)):
            self._save(step)
        if asked or step == self.total_steps:
            self.checkpoints.settle()
        if asked:
            raise Stopped

    def return_to_best(self) -> bool:
        """After the last step: give what learns the weights of the best evaluation, where that was an earlier one.

        Raises:
            ValueError: its checkpoint is damaged.
        """
        there = broadcast_object(steps_in(self.checkpoints.folder))
        step = self.progress.best_step
        if not self.config.best or step == self.total_steps or step not in there:
            return False
        self.checkpoints.load(open_saved(self.checkpoints.folder, step), self.state.tensors())
        return True

    def finish(self) -> None:
        """The stage is finished: remove its checkpoints."""
        self.checkpoints.remove()

    def _is_due(self, step: int) -> bool:
        interval = self.config.interval_of(self.total_steps)
        return interval > 0 and step % interval == 0 and step < self.total_steps

    def _keeps_best(self, step: int) -> bool:
        saves = self.config.interval_of(self.total_steps) > 0
        return saves and self.config.best and step < self.total_steps

    def _spare(self) -> set[int]:
        return {self.progress.best_step} if self.config.best else set()

    def _save(self, step: int) -> None:
        if step == self.saved_step:
            return
        state = self.state.state_dict() | {"progress": asdict(self.progress)}
        self.checkpoints.save(step, self.state.tensors(), state=state, spare=self._spare())
        self.saved_step = step


def newest_in(folder: Path) -> Path | None:
    """The newest complete checkpoint of the stage in `folder`, unread; for one rank alone."""
    steps = steps_in(folder / CHECKPOINTS)
    return folder_of(folder / CHECKPOINTS, steps[-1]) if steps else None


def forget(folder: Path) -> None:
    """Remove the checkpoints of a finished stage in `folder`, which are there where it was killed at the very end."""
    if (folder / CHECKPOINTS).exists():
        shutil.rmtree(folder / CHECKPOINTS)


def check_resume(folder: Path, *, data: str) -> None:
    """Before anything is loaded: the newest checkpoint of the stage in `folder` was made from the rows of today.

    Raises:
        ValueError: it was not, or it is damaged.
    """
    steps = steps_in(folder / CHECKPOINTS)
    if steps:
        check_data(open_saved(folder / CHECKPOINTS, steps[-1]), data)
