"""The settings of logging, W&B and the report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rlhf.config.bounds import Count, Settings


class WandbMode(StrEnum):
    """How W&B is used; auto is online with a key and a reachable server, else offline. It never prompts."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class ProgressDisplay(StrEnum):
    """What the terminal shows; auto is a bar on a terminal and plain lines elsewhere."""

    auto = "auto"
    bar = "bar"
    plain = "plain"
    quiet = "quiet"


@dataclass(kw_only=True)
class TrackingConfig(Settings):
    """What is shown and recorded."""

    wandb: WandbMode = WandbMode.auto
    """How W&B is used."""
    project: str = "rlhf-pipeline"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null is the key's default."""
    progress: ProgressDisplay = ProgressDisplay.auto
    """What the terminal shows."""
    log_every: Count = 1
    """Optimizer steps (in PPO: iterations) between two rows of `metrics.jsonl`."""
    report: bool = True
    """Write `report.html` after each stage and of the whole run: some seconds each."""
