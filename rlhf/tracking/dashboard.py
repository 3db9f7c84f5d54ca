"""The W&B workspace of the pipeline, defined by the registry of metrics: the only user of wandb_workspaces.

    python -m rlhf.tracking.dashboard --project rlhf-pipeline       saves it as a view of the project, and says where
    python -m rlhf.tracking.dashboard --run-name NAME               shows the stages of that run alone
    python -m rlhf.tracking.dashboard --print                       writes its JSON; needs neither key nor network

Needs `pip install wandb-workspaces`. A saved view is never changed by another call, which saves another one. Left out:
W&B reports (ours is `python -m rlhf.tracking.report`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlhf.tracking.metric_registry import ITERATION, METRICS, PPO, STEP, Metric

PROJECT = "rlhf-pipeline"


@dataclass(frozen=True)
class Chart:
    """A panel before it is W&B's."""

    title: str
    metrics: tuple[str, ...]
    """Keys of the registry; one that ends in `/*` stands for all of its family."""
    x: str
    unit: str = ""


@dataclass(frozen=True)
class Section:
    """Charts under a heading."""

    name: str
    charts: tuple[Chart, ...]
    table: str = ""
    """A table that stands below them."""


def sections() -> list[Section]:
    """What the workspace shows, in its order; every metric of the registry is in some chart."""
    proxy, gold = "eval/score", "gold/*"
    return [
        Section("Objective", _charts(lambda key, entry: entry.section == "Objective")),
        Section(
            "Reward and KL",
            (
                Chart("Held-out score over KL", (proxy,), x="eval/kl", unit="score"),
                Chart("Metrics that no model was trained on, over KL", (gold,), x="eval/kl"),
                Chart("Held-out score", (proxy,), x=ITERATION, unit="score"),
                Chart("Metrics that no model was trained on", (gold,), x=ITERATION),
                *_charts(lambda key, entry: _of_ppo(key, entry) and key not in (proxy, gold)),
            ),
        ),
        Section("Actor", _charts(lambda key, _: key.startswith(("policy/", "actor/")))),
        Section("Critic", _charts(lambda key, _: key.startswith(("val/", "critic/")))),
        Section("Samples", _charts(lambda key, entry: entry.section == "Rollout"), table="samples"),
        Section("SFT", _charts(lambda key, entry: _is_supervised(entry, "sft"))),
        Section("Reward model", _charts(lambda key, entry: _is_supervised(entry, "reward"))),
        Section("Throughput", _charts(lambda key, entry: entry.section == "Throughput")),
        Section("Memory", _charts(lambda key, entry: entry.section == "Memory")),
    ]


def _charts(belongs: Callable[[str, Metric], bool]) -> tuple[Chart, ...]:
    """A chart for each metric that belongs."""
    found = {key: entry for key, entry in METRICS.items() if belongs(key, entry)}
    return tuple(Chart(entry.meaning, (key,), x=entry.step, unit=entry.unit) for key, entry in found.items())


def _of_ppo(key: str, entry: Metric) -> bool:
    return entry.section == "Evaluation" and entry.stages == PPO


def _is_supervised(entry: Metric, stage: str) -> bool:
    return entry.section in ("Training", "Evaluation") and stage in entry.stages


def workspace(*, entity: str, project: str, name: str, run_name: str = "") -> Any:
    """The workspace as wandb_workspaces has it.

    Args:
        entity: team or user.
        project: where the runs are.
        name: of the view.
        run_name: show only the stages of this run; else all runs of the project.

    Raises:
        ValueError: that package is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ValueError(
            f"the dashboard needs a package that is not here ({error.name}); run `pip install wandb-workspaces`."
        ) from error
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(name=section.name, panels=list(_panels(section, panels)), is_open=True)
            for section in sections()
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
        runset_settings=workspaces.RunsetSettings(
            filters=f"Metric('Group') == {_quoted(run_name)}" if run_name else "",
            groupby=[workspaces.Metric("Group"), workspaces.Metric("JobType")],
        ),
    )


def _quoted(text: str) -> str:
    """A literal for a filter, whose parser would change `lr=0.1` to `lr==0.1` even between quotes."""
    return "'" + "".join(letter if letter.isalnum() else f"\\U{ord(letter):08x}" for letter in text) + "'"


def _panels(section: Section, panels: Any) -> Iterator[Any]:
    for chart in section.charts:
        families = [key for key in chart.metrics if key.endswith("/*")]
        named = {"metric_regex": f"{families[0][:-1]}.+"} if families else {"y": list(chart.metrics)}
        yield panels.LinePlot(title=chart.title, x=chart.x, title_y=chart.unit or None, **named)
    if section.table:
        yield panels.WeavePanelSummaryTable(table_name=section.table)


def as_json(found: Any) -> str:
    """What is sent to W&B."""
    return str(found._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2))


def save(*, entity: str | None, project: str, name: str, run_name: str = "") -> str:
    """Save the workspace; where it can be seen.

    Raises:
        ValueError: W&B cannot be reached with a key, or does not take it.
    """
    # Here, not above: printing needs no key, and so no wandb.
    from rlhf.tracking.wandb import default_entity, refusals

    found = workspace(entity=entity or default_entity(), project=project, name=name, run_name=run_name)
    with refusals():
        return str(found.save().url)


def main() -> None:
    """Do what the command line says; what cannot be done ends with one sentence."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.tracking.dashboard", description="The W&B workspace.")
    parser.add_argument("--project", default=os.environ.get("WANDB_PROJECT", PROJECT))
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY"), help="team or user; else the key's own")
    parser.add_argument("--name", help="of the view; else that of the run, or RLHF pipeline")
    parser.add_argument(
        "--run-name", default="", help="show the stages of this run alone (`name` of its configuration)"
    )
    parser.add_argument("--print", action="store_true", help="write its JSON instead of saving it")
    arguments = parser.parse_args()
    name = arguments.name or arguments.run_name or "RLHF pipeline"
    names = {"project": arguments.project, "name": name, "run_name": arguments.run_name}
    try:
        if arguments.print:
            text = as_json(workspace(entity=arguments.entity or "", **names))
        else:
            text = save(entity=arguments.entity, **names)
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
