"""Settings of logging, W&B and the report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rlhf.config.bounds import Count, Settings


class WandbMode(StrEnum):
    """Mode of W&B; auto is online with a key and a reachable server, else offline. It never prompts."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class ProgressDisplay(StrEnum):
    """Progress display; auto is a bar on a terminal and plain lines elsewhere."""

    auto = "auto"
    bar = "bar"
    plain = "plain"
    quiet = "quiet"


@dataclass(kw_only=True)
class TrackingConfig(Settings):
    """Logging, W&B and the report."""

    wandb: WandbMode = WandbMode.auto
    """Mode of W&B."""
    project: str = "rlhf-pipeline"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null is the key's default."""
    progress: ProgressDisplay = ProgressDisplay.auto
    """Progress display on the terminal."""
    log_every: Count = 1
    """Optimizer steps (in PPO: iterations) between two rows of `metrics.jsonl`."""
    report: bool = True
    """Write `report.html` after each stage and of the whole run: some seconds each."""
