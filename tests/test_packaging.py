"""The wheel holds all that the checkout runs on: code, YAML, data, licences."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def tracked():
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel was installed, with its command in `bin/`."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    done = run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, folder / "source"], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    done = run([*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def run(words, *, cwd, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    words = list(map(str, words))
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1500, check=False)


def test_the_wheel_has_every_tracked_file_that_is_needed(installed):
    needed = {name for name in tracked() if name.split("/")[0] in {"rlhf", "stages", "data", "conf", "run_pipeline.py"}}
    assert {name for name in needed if not (installed / name).exists()} == set()


SFT = ("experiment=smoke", "stage=sft", "sft.max_steps=1", "tracking.report=false")
ROWS = """
def rows(split):
    return [{"prompt": f"Say {word}:", "completion": f" {word}"} for word in "one two three four five six".split()] * 8
"""


@pytest.fixture
def folder(tmp_path):
    """Where a user starts: with files of theirs, and folders called like ours."""
    (tmp_path / "my.py").write_text(ROWS)
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    for name in ("data", "conf", "rlhf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user has this folder')")
    return tmp_path


@pytest.mark.parametrize(
    "launcher",
    [
        ["{site}/bin/rlhf-pipeline", "--num_gpus", "2"],
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "run_pipeline"],
    ],
    ids=["command", "module"],
)
def test_the_installed_command_takes_the_users_files_from_where_it_is_started(installed, folder, launcher):
    launcher = [word.format(site=installed) for word in launcher]
    words = ["data.sft.train=[{path: my.py:rows}]", "data.sft.eval=[{path: my.py:rows}]", "engine.deepspeed=ds.json"]
    done = run([*launcher, *SFT, *words, "output_dir=out"], cwd=folder, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "out/sft/model/model.safetensors").exists()
    assert str(ROOT / "stages") not in done.stderr
    config = yaml.safe_load((folder / "out/config.yaml").read_text())
    assert config["sft"]["engine"]["zero_stage"] == 3  # of the file
    (start,) = [json.loads(line) for line in (folder / "out/origin.jsonl").read_text().splitlines()]
    assert start["ranks"] == 2


def test_the_command_explains_itself_and_refuses_what_does_not_exist(installed, folder):
    command = installed / "bin/rlhf-pipeline"
    done = run([command, "--help"], cwd=folder, PYTHONPATH=str(installed))
    assert "rlhf-pipeline --num_gpus" in done.stdout
    done = run([command, "sft.nonsense=1"], cwd=folder, PYTHONPATH=str(installed))
    assert done.returncode == 1
    assert "error: sft.nonsense: there is no such setting" in done.stderr
    assert not (folder / "outputs").exists()
