"""What every stage has: a folder, a tokenizer, a tracker, a clock, and one way to start, step and finish."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from rlhf import dist
from rlhf.config import RunConfig
from rlhf.dist import World
from rlhf.engine.engine import Engine
from rlhf.models.export import export
from rlhf.text import Tokenizer, load_tokenizer, template_fingerprint
from rlhf.tracking.timing import Stopwatch, memory_metrics
from rlhf.tracking.tracker import Tracker
from stages.composition import as_plain
from stages.handover import Record, claim_folder, write_record
from stages.planning_measured import beside_plan
from stages.resume import Keeper, Parts, Progress
from stages.stopping import StopSignals

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")


@dataclass
class Session:
    """One stage of a run, on one rank."""

    run: RunConfig
    stage: str
    world: World
    folder: Path
    tokenizer: Tokenizer
    tracker: Tracker
    watch: Stopwatch
    stop: StopSignals
    step_started: float = field(default_factory=time.perf_counter)
    """When the last step was finished."""
    _keeper: Keeper | None = None

    @property
    def pad_id(self) -> int:
        """What padding holds."""
        return int(self.tokenizer.pad_token_id)

    @property
    def keeper(self) -> Keeper:
        """What saves the stage."""
        assert self._keeper is not None, "a stage begins before it takes steps"
        return self._keeper

    @property
    def progress(self) -> Progress:
        """How far the stage is."""
        return self.keeper.progress

    def begin(self, parts: Parts, *, evaluate: Callable[[], dict[str, float]]) -> None:
        """Go on from the newest checkpoint, or evaluate for the first time where there is none."""
        total_steps = self.tracker.total_steps
        self._keeper = Keeper.of(
            self.folder, self.run.checkpoint, stage=self.stage, total_steps=total_steps, parts=parts
        )
        if self.keeper.resume():
            self.tracker.rewind(self.progress.step)
        else:
            self.tracker.rewind(-1)
            self.progress.before = self.progress.after = evaluate()
            self._log(0, self.progress.before)
        if self.progress.step < total_steps:
            self.stop.listen()

    def steps(self, loader: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """The batches that are left, each with the number of its step, counted from 1."""
        return enumerate(loader, start=self.progress.step + 1)

    def finish_step(
        self, step: int, metrics: dict[str, float], *, evaluation: dict[str, float], num_tokens: float
    ) -> None:
        """Log what a step did, and save the stage if it is time to.

        Args:
            step: steps taken.
            metrics: what the step did.
            evaluation: held-out metrics, empty where there was no evaluation.
            num_tokens: of the step, over all ranks.

        Raises:
            Stopped: the run was interrupted; it has saved itself.
        """
        self._log(step, metrics | evaluation, num_tokens=num_tokens)
        with self.watch("save"):
            self.keeper.after_step(step, evaluation, stop=self.stop.asked)
        if step == self.tracker.total_steps:
            self.stop.release()
            late = torch.tensor(int(self.stop.asked), device=self.world.device)
            if dist.max_over_ranks(late).item():  # after the ranks had agreed to go on
                raise KeyboardInterrupt

    def _log(self, step: int, metrics: dict[str, float], *, num_tokens: float = 0.0) -> None:
        """Where the time of the step went, too, and how many of `num_tokens` it did in a second."""
        now = time.perf_counter()
        seconds, self.step_started = now - self.step_started, now
        timing = self.watch.take() | {"timing_s/step": seconds}
        if num_tokens:
            busy = seconds - timing.get("timing_s/evaluate", 0.0) - timing.get("timing_s/save", 0.0)
            metrics = metrics | {"perf/tokens_per_second": num_tokens / busy}
        self.tracker.log(step, metrics | timing | memory_metrics(self.world.device))

    def evaluates_at(self, step: int, every: int) -> bool:
        """True after every `every` steps (0: never in between) and after the last one."""
        return step == self.tracker.total_steps or (every > 0 and step % every == 0)

    def export(self, engine: Engine, name: str) -> Path:
        """Write a model to the stage's folder, loadable without this project; all ranks must call it."""
        folder = self.folder / name
        with self.watch("save"):
            tensors = engine.full_tensors()
            export(engine.module, tensors, folder=folder, tokenizer=self.tokenizer, write=self.world.is_main)
            dist.barrier()
        return folder

    def finish(self, *models: Path, record: Record) -> Record:
        """Leave the record beside each model and, last of all, in the stage's folder: the stage is finished."""
        broken = [name for name, value in record.after.items() if not math.isfinite(value)]
        if broken:
            raise RuntimeError(
                f"{self.stage} ended with {', '.join(broken)} not finite, so it does not count as finished. Look at "
                f"{self.folder / 'metrics.jsonl'}; lower the learning rate, or set engine.precision=fp32."
            )
        self.tracker.summary(record.after | beside_plan(self.run, self.stage, world=self.world, watch=self.watch))
        if self.world.is_main:
            for folder in (*models, self.folder):
                write_record(record, folder)
        dist.barrier()
        self.keeper.finish()
        return record

    def record(self) -> Record:
        """The record of this stage, with held-out metrics from before and after training."""
        return Record(
            stage=self.stage,
            template=template_fingerprint(self.tokenizer),
            pad_id=self.pad_id,
            before=self.progress.before,
            after=self.progress.after,
        )

    def close(self) -> None:
        """Signals do what they did before, and nothing is written any more."""
        self.stop.release()
        if self._keeper is not None:
            self._keeper.checkpoints.close()


def stage_tokenizer(run: RunConfig, path: str) -> Tokenizer:
    """The tokenizer at `path`, with the run's template and pad token."""
    return load_tokenizer(path, chat_template=run.model.chat_template, pad_token=run.model.pad_token)


@contextmanager
def open_session(
    run: RunConfig, stage: str, *, world: World, tokenizer: Tokenizer, total_steps: int
) -> Iterator[Session]:
    """Claim the stage's folder and open its tracker; both are closed whatever happens.

    Args:
        run: the whole configuration.
        stage: `sft`, `reward` or `ppo`.
        world: this process among its peers.
        tokenizer: what the stage reads and writes with.
        total_steps: optimizer steps (PPO: iterations) of the stage.
    """
    folder = Path(run.output_dir) / stage
    log.info("%s: %s steps, into %s", stage, total_steps, folder)
    if world.is_main:
        claim_folder(run, stage)
    with Tracker(
        folder,
        stage=stage,
        config=run.tracking,
        run_name=run.name,
        run_config=as_plain(run),
        total_steps=total_steps,
        world=world,
    ) as tracker:
        stop = StopSignals(speaks=world.is_main)
        session = Session(run, stage, world, folder, tokenizer, tracker, Stopwatch(world.device), stop)
        try:
            yield session
        finally:
            session.close()
