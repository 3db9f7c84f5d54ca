"""Records what a stage reports: metrics, samples and a summary, to files, the progress display and W&B.

The files under the stage's folder are complete without W&B: `metrics.jsonl` (step, time, metrics), `samples.jsonl`
(step, and what the model answered) and `summary.json`. Left out: averaging (stages log finished numbers).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rlhf.config.run_config import TrackingConfig, WandbMode
from rlhf.runtime.atomic_files import read_json, write_text
from rlhf.runtime.dist import World
from rlhf.tracking.alerts import StageChecks
from rlhf.tracking.console import StageProgress
from rlhf.tracking.jsonl_log import JsonlLog, by_step, valid_json
from rlhf.tracking.metric_registry import check, metric

if TYPE_CHECKING:
    from rlhf.tracking.wandb import WandbRun

logger = logging.getLogger(__name__)


@dataclass
class Tracker:
    """Records one stage. Every rank may call every method; only the main rank writes or shows anything."""

    folder: Path
    """The stage's folder, directly under the run's output folder."""
    _: KW_ONLY
    stage: str
    """Its title: sft, reward, ppo, grpo, ..."""
    config: TrackingConfig
    run_name: str
    """Groups the stages of one run in W&B."""
    run_config: dict[str, Any]
    """The run's whole configuration, resolved."""
    total_steps: int
    """Optimizer steps of the stage (PPO: iterations)."""
    world: World

    def __post_init__(self) -> None:
        self._columns: tuple[str, ...] = ()
        self._written: dict[str, int] = {}
        if not self.world.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._summary_file = self.folder / "summary.json"
        self._summary = read_json(self._summary_file)
        self._metrics, self._samples = JsonlLog(self.folder / "metrics.jsonl"), JsonlLog(self.folder / "samples.jsonl")
        for log in (self._metrics, self._samples):
            log.repair()
        self._checks: StageChecks | None = None
        self._answers: tuple[int, Sequence[Mapping[str, Any]]] = (-1, ())
        self._progress = StageProgress(self.stage, self.total_steps, mode=self.config.progress)
        self._run = start_wandb(
            self.folder,
            root=self.folder.parent,
            stage=self.stage,
            config=self.config,
            run_name=self.run_name,
            run_config=self.run_config,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step.

        With `log_every` above 1 the rows between are shown but not recorded; the last step, evaluations and rows that
        raise an alert always are. Each alert is raised once, as a warning here and as a W&B alert.

        Args:
            step: optimizer steps (PPO: iterations) finished; 0 is before the first.
            metrics: numbers by their key in the registry, already reduced over the ranks.

        Raises:
            ValueError: a key that the registry does not know, or gives to other stages; on every rank.
        """
        check(self.stage, list(metrics))
        if not self.world.is_main:
            return
        values = {key: float(value) for key, value in metrics.items()}
        self._progress.show(step, values)
        row = {"step": step, "time": round(time.time(), 3), **values}
        evaluated = any(metric(key).section == "Evaluation" for key in values)
        is_recorded = evaluated or step % self.config.log_every == 0 or step >= self.total_steps
        if self._checks is None:  # made with the first row, because a resumed stage rewinds the files before
            rows, samples = self._metrics.rows(), self._samples.rows()
            self._checks = StageChecks(self.stage, rows, samples=samples, total_steps=self.total_steps)
        answered, answers = self._answers
        alerts = self._checks.add(row, answers if answered == step else (), is_recorded=is_recorded)
        if is_recorded or alerts:
            self._metrics.append(row)
            if self._run is not None:
                self._run.log(step, values)
        if step >= self.total_steps:
            self.summary({"steps": step})
        for name, text in alerts.items():
            logger.warning("%s: %s", self.stage, text)
            if self._run is not None:
                self._run.alert(f"{self.run_name}/{self.stage}: {name}", text)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record answers of the model: one row per response, with the same columns in every call."""
        for row in rows:
            self._columns = self._columns or tuple(row)
            assert tuple(row) == self._columns, f"samples have the columns {self._columns}, this one {tuple(row)}"
        if not self.world.is_main or not rows:
            return
        self._answers = (step, rows)
        for row in rows:
            self._samples.append({"step": step, **row})
        if self._run is not None:
            self._run.samples(step, rows)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record final values of the stage; earlier ones stay unless they are named again."""
        if not self.world.is_main:
            return
        self._summary |= values
        write_text(self._summary_file, json.dumps(valid_json(self._summary), indent=2) + "\n")
        if self._run is not None:
            self._run.summary(values)

    def models(self, folders: Mapping[str, Path]) -> None:
        """Tell W&B where the stage's models are, by name; nothing is copied."""
        if self.world.is_main and self._run is not None:
            self._run.models(folders)

    def state_dict(self) -> dict[str, int]:
        """How many rows each file has, for a checkpoint."""
        logs = (self._metrics, self._samples) if self.world.is_main else ()
        return {log.path.name: log.count() for log in logs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set how many rows the next `rewind` expects."""
        self._written = state

    def rewind(self, step: int) -> None:
        """Delete the rows after `step`, which a resumed stage will log again; -1 deletes all.

        W&B cannot take rows back: online, the repeated steps are drawn twice. Offline, a resumed run starts a new log,
        and that of a killed one is removed. So the new log gets all rows again and is complete.
        """
        if not self.world.is_main:
            return
        for log in (self._metrics, self._samples):
            left, written = log.rewind(step), self._written.get(log.path.name, 0)
            if left < written:
                logger.warning(
                    "%s holds %d of the %d rows that were written up to step %d: the others are lost, and will be "
                    "missing from reports and curves",
                    *(log.path, left, written, step),
                )
        if step >= 0 and self._run is not None and self._run.is_offline:
            for row in self._metrics.rows():
                values = {key: value for key, value in row.items() if "/" in key and value is not None}
                self._run.log(row["step"], values)
            for at, rows in by_step(self._samples.rows()).items():
                self._run.samples(at, [{key: value for key, value in row.items() if key != "step"} for row in rows])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Close the display and the W&B run, which takes a minute at most."""
        if not self.world.is_main:
            return
        self._progress.close()
        if self._run is not None:
            self._run.finish(failed=kind is not None)


def start_wandb(
    folder: Path, *, root: Path, stage: str, config: TrackingConfig, run_name: str, run_config: dict[str, Any]
) -> WandbRun | None:
    """Start the W&B run of what is done in `folder`; None if the configuration asks for none.

    Raises:
        ValueError: W&B was asked to be online, and cannot be.
    """
    mode = requested_mode(config.wandb)
    if mode is WandbMode.disabled:
        return None
    # Imported here: the other ranks, and runs without W&B, need neither wait for it nor have it installed.
    from rlhf.tracking.wandb import WandbRun

    config = replace(config, wandb=mode)
    return WandbRun(folder, root=root, stage=stage, config=config, run_name=run_name, run_config=run_config)


def requested_mode(configured: WandbMode) -> WandbMode:
    """The configured mode, or WANDB_MODE if the configuration says auto.

    Raises:
        ValueError: WANDB_MODE is none of the modes.
    """
    if configured is not WandbMode.auto:
        return configured
    wanted = os.environ.get("WANDB_MODE", "").lower() or "auto"
    modes = {**{mode.value: mode for mode in WandbMode}, "dryrun": WandbMode.offline, "run": WandbMode.online}
    if wanted not in modes:
        raise ValueError(f"WANDB_MODE={wanted}: expected one of {', '.join(modes)}.")
    return modes[wanted]
