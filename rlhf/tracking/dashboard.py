"""The W&B workspace: every metric of the registry in a chart of its kind. The only user of wandb_workspaces.

    python -m rlhf.tracking.dashboard --project rlhf-pipeline       saves a view of the project and prints its address
    python -m rlhf.tracking.dashboard --run-name NAME               shows the stages of that run alone
    python -m rlhf.tracking.dashboard --print                       prints its JSON; needs neither key nor network

Needs `pip install wandb-workspaces`. Each call saves a new view. Left out: W&B reports (see `rlhf.tracking.report`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rlhf.tracking.chart_table import charts, pattern
from rlhf.tracking.metric_registry import METRICS, STEP

OVER_KL = ("eval/score", "gold/*")
"""Metrics drawn over KL too, at the start of `Evaluation`."""
PHASES = ("generate", "score", "train", "evaluate", "save")
"""Phases of a step that follow each other, stacked at the start of `Throughput`."""


def workspace(*, entity: str, project: str, name: str, run_name: str = "") -> Any:
    """Build the workspace `name`, of one run or, with an empty `run_name`, of all runs of the project."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports.v2 import interface as v2

    def plot(title: str, keys: Sequence[str], *, unit: str, x: str = STEP, **look: Any) -> Any:
        is_family = any("*" in key for key in keys)
        named = {"metric_regex": f"^({'|'.join(map(pattern, keys))})$"} if is_family else {"y": list(keys)}
        return v2.LinePlot(title=title, x=x, title_y=unit or None, **named, **look)

    panels = defaultdict(list)
    for (section, title), keys in charts().items():
        entry, is_alone = METRICS[keys[0]], title in METRICS
        panels[section].append(plot(entry.meaning if is_alone else title, keys, unit=entry.unit))
    panels["Evaluation"] = [
        plot(f"{METRICS[key].meaning}, over KL", [key], unit=METRICS[key].unit, x="eval/kl") for key in OVER_KL
    ] + panels["Evaluation"]
    phases = [f"timing_s/{phase}" for phase in PHASES]
    panels["Throughput"].insert(0, plot("Where the time goes", phases, unit="seconds", plot_type="stacked-area"))
    panels["Rollout"].append(v2.WeavePanelSummaryTable(table_name="samples"))
    # Escaped letter by letter: the filter's parser would change `lr=0.1` to `lr==0.1` even between quotes.
    group = "".join(letter if letter.isalnum() else f"\\U{ord(letter):08x}" for letter in run_name)
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[workspaces.Section(name=section, panels=found, is_open=True) for section, found in panels.items()],
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
        runset_settings=workspaces.RunsetSettings(
            filters=f"Metric('Group') == '{group}'" if run_name else "",
            groupby=[workspaces.Metric("Group"), workspaces.Metric("JobType")],
        ),
    )


def as_json(found: Any) -> str:
    """The JSON that is sent to W&B."""
    return str(found._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2))


def main() -> None:
    """Save the workspace and print its address, or print its JSON; an error is one sentence."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.tracking.dashboard", description="The W&B workspace.")
    parser.add_argument("--project", default=os.environ.get("WANDB_PROJECT", "rlhf-pipeline"))
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY"), help="team or user; else the key's own")
    parser.add_argument("--name", help="of the view; else that of the run, or RLHF pipeline")
    parser.add_argument("--run-name", default="", help="show the stages of this run alone (its setting `name`)")
    parser.add_argument("--print", action="store_true", help="write its JSON instead of saving it")
    given = parser.parse_args()
    about = {"project": given.project, "name": given.name or given.run_name or "RLHF pipeline"}
    try:
        if given.print:
            sys.stdout.write(as_json(workspace(entity=given.entity or "", run_name=given.run_name, **about)) + "\n")
            return
        from rlhf.tracking.wandb import asking_server, default_entity  # printing needs no key, and so no wandb

        found = workspace(entity=given.entity or default_entity(), run_name=given.run_name, **about)
        with asking_server():
            sys.stdout.write(f"{found.save().url}\n")
    except ImportError as error:
        sys.exit(
            f"error: the dashboard needs a package that is not here ({error.name}); run `pip install wandb-workspaces`."
        )
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
