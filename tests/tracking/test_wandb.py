"""W&B never asks, never hangs, and what it recorded is read back from its own files or its server."""

import json
import os
import pty
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.tracking.wandb import _run_id
from tests.tracking.wandb_server import serving

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef" * 3
HANGS = 600
"""Seconds after which a process hangs, however slow the machine is."""

CHOOSE = """
import sys
from rlhf.config.run_config import WandbMode
from rlhf.tracking.wandb import why_offline
for wanted in sys.argv[1:]:
    try:
        reason = why_offline(WandbMode(wanted))
        sys.stdout.write(f"offline: {reason}\\n" if reason else "online\\n")
    except ValueError as error:
        sys.stdout.write(f"error: {error}\\n")
"""

RUN = """
import logging, sys
from pathlib import Path
from rlhf.config.run_config import TrackingConfig, WandbMode
from rlhf.tracking import wandb as gate
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
gate._INIT_SECONDS = 500.0  # no test but one is about time
gate._FINISH_SECONDS = 500.0
folder = Path(sys.argv[2]) / "ppo"
folder.mkdir(parents=True, exist_ok=True)
config = TrackingConfig(wandb=WandbMode(sys.argv[1]), project="project")
about = {"root": folder.parent, "stage": "ppo", "run_name": "exp", "run_config": {"ppo": {"kl": {"coef": 0.05}}}}
run = gate.WandbRun(folder, config=config, **about)
first = int(sys.argv[3])
for step in range(first, first + 3):
    run.log(step, {"objective/kl": step / 2, "objective/scores": float("nan") if step == 2 else 1.0})
"""
SAMPLES = """
run.samples(first, [{"prompt": "p", "response": "\\x1b[2J \\ud800 \\u65e5", "score": 1}])
run.samples(first + 1, [{"prompt": "q", "response": "", "score": float("nan")}])
run.summary({"eval/score": 2.5})
"""
MORE = """
run.alert("exp/ppo: kl", "the policy has run away")
(folder / "actor").mkdir()
(folder / "actor/model.safetensors").write_bytes(b"a model" * 1000)
run.models({"actor": folder / "actor"})
"""
FINISH = "run.finish(failed=len(sys.argv) > 4)"


def environment(home, **settings):
    """Ours without anything that W&B or a proxy left there."""
    kept = {key: value for key, value in os.environ.items() if "WANDB" not in key and "proxy" not in key.lower()}
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), **settings}


def python(script, *arguments, home, **settings):
    """Output and log of `script` in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command,
        env=environment(home, **settings),
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    return done


@contextmanager
def port(*, listening):
    """An address of this machine where somebody listens, or nobody."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def choices(*wanted, home, **settings):
    return python(CHOOSE, *wanted, home=home, **settings).stdout.splitlines()


def test_without_a_key_it_is_offline_and_online_is_an_error(tmp_path):
    auto, online = choices("auto", "online", home=tmp_path)
    assert auto == "offline: there is no API key"
    assert online.startswith(
        "error: tracking.wandb=online: there is no API key. Run `wandb login` or set WANDB_API_KEY"
    )


def test_on_a_terminal_it_does_not_ask_for_a_key(tmp_path):
    main, terminal = pty.openpty()
    command = [sys.executable, "-c", CHOOSE, "auto"]
    process = subprocess.Popen(command, env=environment(tmp_path), stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert process.wait(timeout=HANGS) == 0
    assert os.read(main, 1000) == b"offline: there is no API key\r\n"
    os.close(main)


def test_a_malformed_key_is_named_and_not_used(tmp_path):
    auto, online, offline = choices("auto", "online", "offline", home=tmp_path, WANDB_API_KEY="abc")
    assert auto.startswith("offline: the API key cannot be used (WANDB_API_KEY invalid")
    assert online.startswith("error: tracking.wandb=online: the API key cannot be used")
    assert offline == "offline: asked for"


def test_with_a_key_but_no_network_it_is_offline_and_online_is_an_error(tmp_path):
    with port(listening=False) as url:
        auto, online = choices("auto", "online", home=tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert auto == f"offline: {url} did not answer within 3 seconds"
    assert online.startswith(f"error: tracking.wandb=online: {url} did not answer")


def test_with_a_key_and_a_server_it_is_online_even_if_wandb_mode_says_offline(tmp_path):
    with port(listening=True) as url:
        settings = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "WANDB_MODE": "offline"}
        assert choices("online", "auto", home=tmp_path, **settings) == [
            "online",
            "online",
        ]


def test_the_key_may_be_in_netrc_and_the_server_behind_a_proxy(tmp_path):
    (tmp_path / ".netrc").write_text(f"machine wandb.example.org login user password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    with port(listening=True) as proxy:
        settings = {"WANDB_BASE_URL": "http://wandb.example.org", "http_proxy": proxy}
        assert choices("auto", home=tmp_path, **settings) == ["online"]


def records(run_folder):
    """The records of an offline run by type, as W&B's own reader gives them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANGS).stdout.splitlines()
    found = {}
    for record in map(json.loads, lines):
        found.setdefault(record["type"], []).append(record.get(record["type"]))
    return found


def series(found, key):
    rows = [row["item"] for row in found["history"]]
    return [(row["trainer/step"], row[key]) for row in rows if key in row]


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Output of an offline run of three steps, and of its resumption, which fails."""
    home = tmp_path_factory.mktemp("home")
    out = tmp_path_factory.mktemp("out")
    done = python(RUN + SAMPLES + MORE + FINISH, "auto", out, 1, home=home)
    time.sleep(1.1)  # W&B names the folders by the second
    python(RUN + FINISH, "auto", out, 3, "failed", home=home)
    return SimpleNamespace(home=home, out=out, done=done, folders=sorted((out / "wandb").glob("offline-run-*")))


def test_an_offline_run_and_its_resumption_are_read_back(offline):
    first, second = map(records, offline.folders)
    run = first["run"][0]
    assert (run["run_group"], run["job_type"], run["display_name"]) == ("exp", "ppo", "exp/ppo")
    assert run["project"] == "project"
    assert run["config"]["update"]["ppo"] == {"kl": {"coef": 0.05}}
    assert run["run_id"] == second["run"][0]["run_id"] == (offline.out / "ppo/wandb_id").read_text().strip()
    assert run["run_id"].startswith("ppo-")
    assert series(first, "objective/kl") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert series(first, "objective/scores") == [(1, 1), (2, "NaN"), (3, 1)]
    assert series(second, "objective/kl") == [(3, 1.5), (4, 2.0), (5, 2.5)]
    assert [found["exit"][0].get("exit_code", 0) for found in (first, second)] == [0, 1]
    axes = {metric.get("glob_name") or metric["name"]: metric.get("step_metric") for metric in first["metric"]}
    assert axes == {"trainer/step": None, "*": "trainer/step"}
    assert {"eval/score": 2.5}.items() <= {k: v for s in first["summary"] for k, v in s["update"].items()}.items()


def test_an_offline_run_says_one_line_and_leaves_the_home_folder_alone(offline):
    assert offline.done.stdout == ""
    hint = f"see the charts with `wandb leet {offline.out}/wandb`."
    assert offline.done.stderr == f"INFO W&B is offline (there is no API key); {hint}\n"
    assert [file for file in offline.home.rglob("*") if file.is_file()] == []


def test_each_table_file_holds_only_the_new_samples(offline):
    files = offline.folders[0].glob("files/media/table/*.table.json")
    tables = [json.loads(file.read_text()) for file in sorted(files, key=lambda file: file.stat().st_mtime_ns)]
    assert [table["columns"] for table in tables] == [["step", "prompt", "response", "score"]] * 2
    assert [table["data"] for table in tables] == [[[1, "p", "\x1b[2J \ud800 日", 1]], [[2, "q", "", None]]]


def test_alerts_are_recorded(offline):
    found = records(offline.folders[0])
    (alert,) = found["alert"]
    assert (alert["title"], alert["text"]) == ("exp/ppo: kl", "the policy has run away")


def test_a_model_is_referred_to_and_not_copied(offline):
    (model,) = [found for found in records(offline.folders[0])["artifact"] if found["type"] == "model"]
    assert model["name"] == "exp-ppo-actor"
    assert [file["ref"] for file in model["manifest"]["contents"]] == [
        (offline.out / "ppo/actor/model.safetensors").as_uri()
    ]
    copies = [file for file in offline.out.rglob("*") if file.is_file() and b"a modela model" in file.read_bytes()]
    assert copies == [offline.out / "ppo/actor/model.safetensors"]


TRACK = """
import os, signal, sys
from pathlib import Path
import torch
from rlhf.config.run_config import TrackingConfig, WandbMode
from rlhf.runtime.dist import World
from rlhf.tracking.tracker import Tracker
first, resumed = int(sys.argv[2]), int(sys.argv[3])
config = TrackingConfig(wandb=WandbMode.offline, project="project")
about = {"stage": "ppo", "run_name": "exp", "run_config": {}, "total_steps": 9, "world": World.alone()}
with Tracker(Path(sys.argv[1]) / "ppo", config=config, **about) as track:
    track.rewind(resumed)
    for step in range(first, first + 3):
        log(track, step)
    if len(sys.argv) > 4:
        os.kill(os.getpid(), signal.SIGKILL)
"""
WITH_SAMPLES = """
def log(track, step):
    track.samples(step, [{"prompt": "p", "score": step}])
    track.log(step, {"objective/kl": step / 2})
"""
LARGE = """
def log(track, step):  # some of W&B's blocks of 32 KiB for each row, so that a kill costs the last one
    track.log(step, {"objective/kl": step / 2, **{f"gold/{number}": float(step) for number in range(2000)}})
"""


def test_a_killed_and_resumed_offline_run_reads_as_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(AssertionError):
        python(WITH_SAMPLES + TRACK, out, 1, -1, "killed", home=tmp_path)
    time.sleep(1.1)  # W&B names the folders by the second
    python(WITH_SAMPLES + TRACK, out, 3, 2, home=tmp_path)
    (folder,) = (out / "wandb").glob("offline-run-*")  # the killed one is removed
    found = records(folder)
    assert series(found, "objective/kl") == [(step, step / 2) for step in range(1, 6)]
    files = sorted(folder.glob("files/media/table/*.table.json"), key=lambda file: file.stat().st_mtime_ns)
    assert [row for file in files for row in json.loads(file.read_text())["data"]] == [[n, "p", n] for n in range(1, 6)]


def synced(out, *, parts, home):
    """What a server knows after `wandb sync` of all parts of the run."""
    folders = sorted((out / "wandb").glob("offline-run-*"))
    assert len(folders) == parts
    with serving() as server:
        settings = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        command = [sys.executable, "-m", "wandb", "sync", *map(str, folders)]
        environ = environment(home, **settings)
        subprocess.run(command, env=environ, cwd=home, check=True, capture_output=True, timeout=HANGS)
    assert {upsert["name"] for upsert in server.upserts} == {(out / "ppo/wandb_id").read_text().strip()}
    return server


def test_a_killed_and_resumed_run_is_one_whole_run_when_it_is_synced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(AssertionError):
        python(LARGE + TRACK, out, 1, -1, "killed", home=tmp_path)
    (torn,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    assert torn.stat().st_size > 32 * 1024, "the killed part held nothing: it is not what this test is about"
    time.sleep(1.1)  # W&B names the folders by the second
    python(LARGE + TRACK, out, 3, 2, home=tmp_path)
    assert not torn.exists()  # the resumed part, which is told everything, takes its place
    server = synced(out, parts=1, home=tmp_path)
    found = [(row["trainer/step"], row["objective/kl"]) for row in server.rows if "objective/kl" in row]
    assert found == [(step, step / 2) for step in range(1, 6)]


def test_both_parts_of_a_run_are_one_run_when_they_are_synced(tmp_path):
    out = tmp_path / "out"
    for first in (1, 3):
        python(RUN + FINISH, "offline", out, first, home=tmp_path)
        time.sleep(1.1)
    server = synced(out, parts=2, home=tmp_path)
    assert [row["trainer/step"] for row in server.rows if "objective/kl" in row] == [1, 2, 3, 3, 4, 5]


def test_an_online_run_reaches_the_server(tmp_path):
    with serving() as server:
        settings = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        done = python(RUN + FINISH, "online", tmp_path / "out", 1, home=tmp_path, **settings)
    upsert = server.upserts[0]
    assert (upsert["groupName"], upsert["jobType"], upsert["displayName"]) == ("exp", "ppo", "exp/ppo")
    assert json.loads(upsert["config"])["ppo"]["value"] == {"kl": {"coef": 0.05}}
    assert [(row["trainer/step"], row["objective/kl"]) for row in server.rows] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert done.stderr.startswith(f"INFO W&B: {server.url}/")


def test_a_server_that_turns_us_away_means_offline_unless_online_was_asked_for(tmp_path):
    with serving("reject") as server:
        settings = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        done = python(RUN + FINISH, "auto", tmp_path / "out", 1, home=tmp_path, **settings)
        with pytest.raises(AssertionError, match=r"ValueError: tracking\.wandb=online: .*401"):
            python(RUN + FINISH, "online", tmp_path / "out", 1, home=tmp_path, **settings)
    assert done.stderr.startswith("WARNING W&B is offline (")
    assert "401" in done.stderr
    (folder,) = (tmp_path / "out/wandb").glob("offline-run-*")
    assert series(records(folder), "objective/kl") == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_an_upload_that_never_ends_is_given_up(tmp_path):
    with serving("swallow") as server:
        settings = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        done = python(
            RUN.replace("FINISH_SECONDS = 500", "FINISH_SECONDS = 2") + FINISH,
            "auto",
            tmp_path / "out",
            1,
            home=tmp_path,
            **settings,
        )
    assert "WARNING W&B did not take everything in time; run `wandb sync " in done.stderr


def test_samples_that_the_server_does_not_take_do_not_stop_the_stage(tmp_path):
    with serving("no tables") as server:
        settings = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}
        done = python(RUN + SAMPLES + FINISH, "auto", tmp_path / "out", 1, home=tmp_path, **settings)
    assert done.stderr.count("WARNING W&B did not take the samples of step") == 2
    assert [row["trainer/step"] for row in server.rows if "objective/kl" in row] == [1, 2, 3]


def test_an_id_that_was_cut_is_named(tmp_path):
    first = _run_id(tmp_path, "sft")
    assert _run_id(tmp_path, "sft") == first
    file = tmp_path / "wandb_id"
    for damaged in (b"", file.read_bytes()[:-4], b"\xff\xfe\n"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"wandb_id is damaged: found b.*Remove it for a new W&B run"):
            _run_id(tmp_path, "sft")
