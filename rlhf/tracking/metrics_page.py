"""Writes `docs/metrics.md`, every number that a run logs: `python -m rlhf.tracking.metrics_page > docs/metrics.md`."""

from __future__ import annotations

import sys
from importlib import resources

from rlhf.tracking.metric_registry import ALL, EXAMPLES, METRICS, PPO


def page() -> str:
    """The page: how to read the time, then a table of each section of the registry."""
    text = resources.files("rlhf.tracking").joinpath("metrics_page.md").read_text("utf-8")
    for section in dict.fromkeys(metric.section for metric in METRICS.values()):
        text += f"\n## {section}\n\n| key | unit | stages | meaning |\n| --- | --- | --- | --- |\n"
        for key, metric in METRICS.items():
            if metric.section == section:
                stages = {ALL: "all", PPO: "PPO and its variants", EXAMPLES: "SFT, reward, DPO"}.get(metric.stages)
                text += f"| `{key}` | {metric.unit} | {stages or ', '.join(metric.stages)} | {metric.meaning} |\n"
    return text


if __name__ == "__main__":
    sys.stdout.write(page())
