"""The workspace: every panel shows something that is logged, every metric is shown, and W&B would get it."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.tracking import dashboard
from rlhf.tracking.metric_registry import METRICS, STEP, metric, registered
from tests.tracking.test_wandb import HANGS, KEY, environment, port
from tests.tracking.wandb_server import serving

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "rlhf.tracking.dashboard"]


def call(*arguments, home, command=COMMAND, **settings):
    """What the command says."""
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=environment(home, **settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


def call_on_a_terminal(*, home, **settings):
    """Exit status of the command, and what it says on a terminal that nobody answers at.

    W&B asks only where both stdin and stderr are a terminal.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        COMMAND, cwd=ROOT, env=environment(home, **settings), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        status = process.wait(timeout=HANGS)
        return status, os.read(ours, 10000).decode()
    finally:
        process.kill()
        os.close(ours)


@pytest.fixture(scope="module")
def spec():
    return json.loads(dashboard.as_json(dashboard.workspace(entity="team", project="p", name="n")))


def without_ids(found):
    """`found` without the random names that wandb_workspaces gives to panels and sections."""
    if isinstance(found, dict):
        return {key: without_ids(value) for key, value in found.items() if key not in ("id", "__id__", "ref")}
    return [without_ids(item) for item in found] if isinstance(found, list) else found


def panels(spec):
    """The line plots by section."""
    sections = spec["section"]["panelBankConfig"]["sections"]
    plots = {found["name"]: [panel["config"] for panel in found["panels"]] for found in sections}
    return {name: [plot for plot in found if "xAxis" in plot] for name, found in plots.items()}


def shown(plot, keys):
    """The keys among `keys` that a panel draws."""
    if plot.get("metrics"):
        return [key for key in keys if key in plot["metrics"]]
    return [key for key in keys if re.search(plot["metricRegex"], key)]


EXAMPLES = [
    *[key for key in METRICS if "*" not in key],
    *("reward/length", "reward/length/std", "reward/length/none", "reward/log/a/b", "eval/reward/length"),
    *("eval/reward/log/a", "ema/loss", "ema/reward/length", "gold/rating", "timing_s/train", "timing_s/train/actor"),
    *("perf/tokens_per_second/train", "perf/fastest_rank_s/train", "perf/slowest_rank_s/train/actor"),
    "memory/train_host_bytes",
]
"""A key for every entry of the registry."""


def test_every_chart_shows_what_some_stage_logs_and_every_metric_has_a_chart(spec):
    assert {registered(key) for key in EXAMPLES} == set(METRICS)
    plots = [plot for found in panels(spec).values() for plot in found]
    assert [plot for plot in plots if not shown(plot, EXAMPLES)] == []
    assert {key for plot in plots for key in shown(plot, EXAMPLES)} == set(EXAMPLES)
    for plot in (plot for plot in plots if plot.get("metrics")):  # of every line, too, there is a metric
        assert set(map(registered, plot["metrics"])) == set(map(registered, shown(plot, EXAMPLES)))


@pytest.mark.parametrize(
    ("drawn", "together"),
    [
        ("reward/length", ["reward/length"]),
        ("reward/length/std", ["reward/length/std"]),
        ("reward/length/none", ["reward/length/none"]),
        ("eval/reward/length", ["eval/reward/length"]),
        ("train/margin", ["train/margin", "train/reward_chosen", "train/reward_rejected"]),
        ("rollout/mismatch_max", ["rollout/mismatch_mean", "rollout/mismatch_max", "rollout/mismatch_weight"]),
        ("perf/tokens_per_second", ["perf/tokens_per_second", "perf/tokens_per_second/train"]),
    ],
)
def test_metrics_of_one_kind_share_a_chart_and_others_have_their_own(spec, drawn, together):
    (plot,) = [plot for found in panels(spec).values() for plot in found if shown(plot, [drawn])]
    assert set(shown(plot, EXAMPLES)) == set(together)


def test_every_chart_is_drawn_over_what_its_metrics_are_logged_with(spec):
    for plot in (plot for found in panels(spec).values() for plot in found):
        for entry in map(metric, shown(plot, EXAMPLES)):
            over = METRICS.get(plot["xAxis"])
            assert over.stages == entry.stages if over else plot["xAxis"] == STEP, plot


def test_sections_stand_in_the_order_in_which_a_run_is_read(spec):
    parts = ["Objective", "Evaluation", "Actor", "Critic", "Rollout", "Training", "Optimizer", "Throughput", "Memory"]
    assert list(panels(spec)) == parts
    assert all(panels(spec).values())


def test_what_is_sent_has_the_axes_units_families_samples_and_groups(spec):
    found = panels(spec)
    (kl,) = [plot for plot in found["Objective"] if plot.get("metrics") == ["objective/kl"]]
    assert (kl["xAxis"], kl["yAxisTitle"]) == ("trainer/step", "nats")
    assert [(plot["xAxis"], shown(plot, EXAMPLES)) for plot in found["Evaluation"][:2]] == [
        ("eval/kl", ["eval/score"]),
        ("eval/kl", ["gold/rating"]),
    ]
    stacked, timing, *_ = found["Throughput"]
    assert (stacked["plotType"], stacked["metrics"][:2]) == ("stacked-area", ["timing_s/generate", "timing_s/score"])
    assert (timing["xAxis"], timing["metricRegex"]) == ("trainer/step", "^(timing_s/[^/]+)$")
    (samples,) = [
        panel
        for section in spec["section"]["panelBankConfig"]["sections"]
        for panel in section["panels"]
        if panel["viewType"] == "Weave"
    ]
    assert "samples" in json.dumps(samples)
    assert [key["name"] for key in spec["section"]["runSets"][0]["grouping"]] == ["group", "jobType"]


def filters(run_name):
    found = dashboard.workspace(entity="team", project="p", name="n", run_name=run_name)
    return json.loads(dashboard.as_json(found))["section"]["runSets"][0]["filters"]["filters"]


@pytest.mark.parametrize("name", ["exp", "lr=0.1", "a<b>c", 'it\'s "it"', "back\\slash", "x within_last 5 days", "名"])
def test_a_run_is_shown_alone_whatever_its_name(name):
    (found,) = filters(name)
    assert (found["key"], found["op"], found["value"]) == ({"section": "run", "name": "group"}, "=", name)


def test_all_runs_are_shown_when_none_is_named():
    assert filters("") == []


def test_it_reads_back_as_it_was_written(spec):
    from wandb_workspaces.workspaces import internal

    assert (
        json.loads(internal.WorkspaceViewspec.model_validate(spec).model_dump_json(by_alias=True, exclude_none=True))
        == spec
    )


def test_printing_needs_neither_key_nor_network(tmp_path):
    done = call("--print", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["section"]["panelBankConfig"]["sections"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "there is no API key. Run `wandb login` or set WANDB_API_KEY"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "closed"}, "did not answer within 3 seconds"),
    ],
)
def test_without_key_or_network_one_line_says_so_and_nobody_is_asked(tmp_path, settings, said):
    with port(listening=False) as nobody:
        settings = {name: nobody if value == "closed" else value for name, value in settings.items()}
        status, output = call_on_a_terminal(home=tmp_path, **settings)
    assert status == 1
    assert output.startswith("error: W&B cannot be asked: ")
    assert said in output
    assert output.count("\n") == 1
    assert "tracking.wandb" not in output  # a setting of a run, which this is not


def test_a_server_gets_the_workspace_and_the_reader_its_address(tmp_path):
    with serving() as server:
        settings = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        done = call("--project", "mine", "--name", "A view", "--run-name", "exp", home=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("team", "mine", "A view")
    sent = json.loads(view["spec"])
    here = dashboard.workspace(entity="team", project="mine", name="A view", run_name="exp")
    assert without_ids(sent) == without_ids(json.loads(dashboard.as_json(here)))
    assert sent["section"]["runSets"][0]["filters"]["filters"][0]["value"] == "exp"
    assert done.stdout.startswith(f"{server.url}/team/mine?nw=")


def test_a_server_that_turns_us_away_is_one_sentence(tmp_path):
    with serving("reject") as server:
        done = call("--entity", "team", home=tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert done.returncode == 1
    assert "error: W&B did not do it (" in done.stderr
    assert "Traceback" not in done.stderr


WITHOUT = """
import runpy, sys
sys.modules["wandb_workspaces"] = None
sys.argv[0] = "dashboard"
runpy.run_module("rlhf.tracking.dashboard", run_name="__main__")
"""


def test_a_missing_package_is_one_sentence_that_says_what_to_install(tmp_path):
    done = call("--print", home=tmp_path, command=[sys.executable, "-c", WITHOUT])
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: the dashboard needs a package that is not here (wandb_workspaces")
    assert done.stderr.endswith("run `pip install wandb-workspaces`.\n")
    assert done.stderr.count("\n") == 1
