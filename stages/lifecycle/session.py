"""A training stage while it runs: folder, tokenizer, tracker, timer and checkpoints, and how it begins and ends."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from rlhf.config.bounds import as_plain
from rlhf.config.roles import AVERAGE
from rlhf.config.run_config import RunConfig
from rlhf.engine.checkpoint.checkpoint_state import seed_random_numbers
from rlhf.engine.engine import Engine
from rlhf.memory_plan.plan_text import compare_with_plan
from rlhf.runtime import dist
from rlhf.runtime.dist import World
from rlhf.runtime.errors import RunError
from rlhf.text.tokenizer import Tokenizer, load_tokenizer, template_fingerprint
from rlhf.tracking.timing import Stopwatch, memory_metrics, seconds_by_rank, throughput
from rlhf.tracking.tracker import Tracker
from stages.lifecycle.checkpointing import CheckpointManager, GracefulStop, TrainingProgress, TrainingState
from stages.lifecycle.model_card import write_card
from stages.lifecycle.stage_models import export_model
from stages.lifecycle.stage_record import RECORD, StageRecord, claim_folder, model_files, write_record
from stages.lifecycle.stage_settings import CONFIG

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")

BEST = "best"
"""Subfolder for the models of the best evaluation."""


@dataclass
class Session:
    """One stage of a run, on one rank."""

    run: RunConfig
    stage: str
    world: World
    folder: Path
    tokenizer: Tokenizer
    tracker: Tracker
    timer: Stopwatch
    stop: GracefulStop
    step_started: float = field(default_factory=time.perf_counter)
    """Clock time at the end of the last step."""
    _checkpoints: CheckpointManager | None = None
    _merged: dict[Path, dict[str, Any]] = field(default_factory=dict)
    """How the adapters of each model were merged, by the folder of the export."""

    @property
    def title(self) -> str:
        """Name of the stage in folders, tables and hints."""
        return self.run.title(self.stage)

    @property
    def pad_id(self) -> int:
        """Token id that fills padding."""
        return int(self.tokenizer.pad_token_id)

    @property
    def checkpoints(self) -> CheckpointManager:
        """The stage's checkpoints."""
        assert self._checkpoints is not None, "a stage begins before it takes steps"
        return self._checkpoints

    @property
    def progress(self) -> TrainingProgress:
        """How far the stage has come."""
        return self.checkpoints.progress

    def begin(
        self,
        state: TrainingState,
        *,
        evaluate: Callable[[], dict[str, float]],
        known: Mapping[str, float] | None = None,
    ) -> None:
        """Resume from the newest checkpoint; if there is none, evaluate, and log that with the metrics in `known`."""
        total_steps, config = self.tracker.total_steps, self.run.training_config(self.stage)
        self._checkpoints = CheckpointManager.of(
            self.folder,
            self.run.checkpoint,
            metric=config.best_metric,
            total_steps=total_steps,
            state=state,
            tracker=self.tracker,
        )
        if self.checkpoints.resume():
            self.tracker.rewind(self.progress.step)
            self.timer.take()
            self.step_started = time.perf_counter()  # opening the models again is no part of a step
        else:
            self.tracker.rewind(-1)
            seed_random_numbers(config.seed, rank=self.world.rank)
            self.progress.before = self.progress.after = evaluate()
            self._log(0, {**self.progress.before, **(known or {})})
        if self.progress.step < total_steps:
            self.stop.listen()

    def steps(self, loader: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """Yield the remaining batches with their step number, counted from 1."""
        return enumerate(loader, start=self.progress.step + 1)

    def finish_step(
        self, step: int, metrics: dict[str, float], *, evaluation: dict[str, float], num_tokens: Mapping[str, float]
    ) -> None:
        """Log a step, and save a checkpoint if one is due.

        Args:
            step: steps taken.
            metrics: training metrics of the step.
            evaluation: held-out metrics, empty if there was no evaluation.
            num_tokens: tokens over all ranks, by phase; `step` is the whole step.

        Raises:
            Stopped: the run was interrupted, and a checkpoint has been saved.
        """
        self._log(step, metrics | evaluation, num_tokens=num_tokens)
        with self.timer("save"):
            self.checkpoints.after_step(step, evaluation, stop=self.stop.asked)
        if step == self.tracker.total_steps:
            self.stop.release()
            late = torch.tensor(int(self.stop.asked), device=self.world.device)
            # A signal after the ranks agreed to go on: all of them stop here. Collective; .item() waits for the device.
            if dist.max_over_ranks(late).item():
                raise KeyboardInterrupt

    def _log(self, step: int, metrics: dict[str, float], *, num_tokens: Mapping[str, float] | None = None) -> None:
        """Log a step with its timing, memory and throughput."""
        now = time.perf_counter()
        seconds, self.step_started = now - self.step_started, now
        timing = self.timer.take() | {"timing_s/step": seconds}
        by_rank = seconds_by_rank(timing, self.world)  # a collective
        metrics = metrics | timing | by_rank | throughput(num_tokens or {}, timing, by_rank=by_rank)
        self.tracker.log(step, metrics | memory_metrics(self.world.device))

    def evaluates_at(self, step: int, every: int) -> bool:
        """True after every `every` steps (0: only at the end) and after the last step."""
        return step == self.tracker.total_steps or (every > 0 and step % every == 0)

    def export(self) -> None:
        """Export the trained models as plain transformers folders; all ranks must call it.

        If the best evaluation was an earlier one, its models go to `best/`, and the engines hold those afterwards.
        """
        self._export_to(self.folder)
        if self.checkpoints.return_to_best():
            self._export_to(self.folder / BEST)

    def finish(
        self,
        *,
        score_units: Callable[[dict[str, float]], tuple[float, float]] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> StageRecord:
        """Write `stage.json` and a card beside each model, and `stage.json` into the stage's folder: it is finished.

        Args:
            score_units: from held-out metrics to the mean and standard deviation of the scalar head's outputs; None
                without a scalar head.
            data: what the record says of the rows.
        """
        record = replace(self._record(self.progress.after, score_units), data=dict(data or {}))
        broken = [name for name, value in record.after.items() if not math.isfinite(value)]
        if broken:
            raise RunError(
                f"{self.title} ended with {', '.join(broken)} not finite, so it does not count as finished. Look at "
                f"{self.folder / 'metrics.jsonl'}; lower the learning rate, or set engine.precision=fp32."
            )
        self._warn_of_no_steps()
        self.tracker.summary(record.after | compare_with_plan(self.run, self.title, world=self.world, timer=self.timer))
        is_best_kept = self.folder / BEST in self._merged
        best = replace(self._record(self.progress.best, score_units), data=record.data) if is_best_kept else record
        self._write_records(record, best)
        if self.world.is_main:
            self.tracker.models({name: self.folder / name for name in self._merged[self.folder]})
        dist.barrier()
        self.checkpoints.finish()
        return record

    def _warn_of_no_steps(self) -> None:
        for name, engine in self.checkpoints.state.engines.items():
            if engine.loss_scale.is_searching and not engine.steps_taken:
                log.warning(
                    "%s: %s has learnt nothing: every step was skipped while searching for fp16's loss scale. Lower "
                    "engine.initial_scale_power, or train for more steps.",
                    self.stage,
                    name,
                )

    def _export_to(self, folder: Path) -> None:
        self._merged[folder] = {}
        for name, engine in self.checkpoints.state.engines.items():
            self._export(engine, folder / name)
            if engine.has_average:
                with engine.averaged():
                    self._export(engine, folder / f"{name}{AVERAGE}")

    def _export(self, engine: Engine, folder: Path) -> None:
        with self.timer("save"):
            self._merged[folder.parent][folder.name] = export_model(engine, folder, tokenizer=self.tokenizer)

    def _write_records(self, record: StageRecord, best: StageRecord) -> None:
        """Write the record beside each model, then into the stage's folder; all ranks must call it.

        Checksums of large models take minutes, so the other ranks wait for each one separately and do not time out.
        """
        sealed = [self.folder / CONFIG]
        for folder, merges in self._merged.items():
            for name, merge in merges.items():
                own_record = replace(record if folder == self.folder else best, merged=_made({name: merge}))
                if self.world.is_main:
                    write_card(folder / name, own_record)
                    write_record(own_record, folder / name, files=model_files(folder / name))
                dist.barrier()
                sealed.append(folder / name / RECORD)
        if self.world.is_main:
            write_record(replace(record, merged=_made(self._merged[self.folder])), self.folder, files=sealed)

    def _record(
        self, after: dict[str, float], score_units: Callable[[dict[str, float]], tuple[float, float]] | None
    ) -> StageRecord:
        """The record of this stage, with held-out metrics from before and `after` training."""
        mean, deviation = score_units(after) if score_units else (None, None)
        return StageRecord(
            stage=self.title,
            template=template_fingerprint(self.tokenizer),
            pad_id=self.pad_id,
            score_mean=mean,
            score_std=deviation,
            before=self.progress.before,
            after=after,
        )

    def close(self) -> None:
        """Restore the signal handlers and cancel an unfinished checkpoint write."""
        self.stop.release()
        if self._checkpoints is not None:
            self._checkpoints.checkpoints.close()


def _made(merges: dict[str, Any]) -> dict[str, Any]:
    """Drop the models without adapters, of which nothing was merged."""
    return {name: merge for name, merge in merges.items() if merge is not None}


def with_average(engine: Engine, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The held-out metrics of a model, and as `ema/*` those of its moving average, if it has one."""
    metrics = evaluate()
    if engine.has_average:
        with engine.averaged():
            metrics |= {f"ema/{name.removeprefix('eval/')}": value for name, value in evaluate().items()}
    return metrics


def stage_tokenizer(run: RunConfig, path: str) -> Tokenizer:
    """The tokenizer at `path`, with the run's template and pad token."""
    return load_tokenizer(path, chat_template=run.model.chat_template, pad_token=run.model.pad_token)


@contextmanager
def open_session(
    run: RunConfig, stage: str, *, world: World, tokenizer: Tokenizer, total_steps: int
) -> Iterator[Session]:
    """Claim the stage's folder and open its tracker; the tracker is closed whatever happens.

    Args:
        run: the whole configuration.
        stage: `sft`, `reward`, `dpo` or `ppo`.
        world: this process among its peers.
        tokenizer: the tokenizer of all models of the stage.
        total_steps: optimizer steps (PPO: iterations) of the stage.
    """
    folder = Path(run.folder(stage))
    log.info("%s: %s steps, into %s", run.title(stage), total_steps, folder)
    if world.is_main:
        claim_folder(run, stage)
    with Tracker(
        folder,
        stage=run.title(stage),
        config=run.tracking,
        run_name=run.name,
        run_config=as_plain(run),
        total_steps=total_steps,
        world=world,
    ) as tracker:
        stop = GracefulStop(prints=world.is_main)
        session = Session(run, stage, world, folder, tokenizer, tracker, Stopwatch(world.device), stop)
        try:
            yield session
        finally:
            session.close()
