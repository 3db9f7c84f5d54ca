"""The wheel holds all that the checkout runs on: code, YAML, data, licences."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tracked():
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    command.append(str(folder / "source"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_every_tracked_file_that_is_needed(unpacked):
    needed = {name for name in tracked() if name.split("/")[0] in {"rlhf", "stages", "data", "conf", "run_pipeline.py"}}
    assert {name for name in needed if not (unpacked / name).exists()} == set()


def test_what_is_unpacked_runs_elsewhere(unpacked, tmp_path):
    command = [sys.executable, str(unpacked / "run_pipeline.py"), "experiment=smoke", "stage=sft", "sft.max_steps=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*command, "output_dir=out"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out/sft/model/model.safetensors").exists()
    assert str(ROOT) not in done.stderr
