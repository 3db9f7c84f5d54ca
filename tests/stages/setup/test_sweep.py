"""A sweep is several runs: each in its folder, with its words, whatever became of the others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.setup import sweep
from stages.setup.sweep import jobs_of, name_of, run_sweep

SWEPT = ["experiment=smoke", "stage=sft", "name=tried", "sft.optimizer.lr=1e-3,3e-3", "seed=range(0,2)"]
RECORDER = """
import json, os, sys
words = sys.argv[1:]
folder = next(word for word in words if word.startswith("output_dir=")).partition("=")[2].strip('"')
os.makedirs(folder + "/sft")
with open(folder + "/words.json", "w") as file:
    json.dump(words, file)
sys.exit("broken" if "sft.optimizer.lr=0.003" in words else 0)
"""


def test_every_combination_is_a_run_in_a_folder_named_after_its_values(tmp_path):
    jobs = jobs_of([*SWEPT, f"output_dir={tmp_path}"])
    assert [job.name for job in jobs] == [
        "sft.optimizer.lr=0.001+seed=0",
        "sft.optimizer.lr=0.001+seed=1",
        "sft.optimizer.lr=0.003+seed=0",
        "sft.optimizer.lr=0.003+seed=1",
    ]
    first = jobs[0]
    assert first.folder == tmp_path
    assert first.words[:4] == ["experiment=smoke", "stage=sft", "sft.optimizer.lr=0.001", "seed=0"]
    assert first.words[4:] == [f'name="tried/{first.name}"', f'output_dir="{tmp_path}/{first.name}"']


def test_the_folder_is_that_of_the_name_and_a_swept_name_is_the_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert jobs_of(SWEPT)[0].folder == tmp_path / "outputs/tried"
    named = jobs_of(["experiment=smoke", "name=a,b"])
    assert [(job.folder, job.name) for job in named] == [(tmp_path / "outputs", "a"), (tmp_path / "outputs", "b")]


def test_choices_are_swept_by_glob_and_lists():
    globbed = jobs_of(["experiment=smoke", "stage=sft", "engine=glob(zero3*)"])
    assert [job.name for job in globbed] == ["engine=zero3", "engine=zero3_cpu", "engine=zero3_nvme"]
    listed = jobs_of(["experiment=smoke", "stage=[sft,reward],[sft]"])
    assert len({job.name for job in listed}) == 2


def test_names_are_for_a_shell_and_tell_values_apart():
    assert name_of({"seed": "1"}) == "seed=1"
    slashed, spaced = name_of({"model.path": "a/b"}), name_of({"model.path": "a b"})
    assert slashed.startswith("model.path=a-b-")
    assert slashed != spaced
    assert len(name_of({"model.path": "x" * 900})) < 200


def test_nothing_starts_when_one_of_the_runs_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"sft\.optimizer\.lr=-1\.0: expected a number above 0"):
        run_sweep(
            ["experiment=smoke", "stage=sft", f"output_dir={tmp_path}", "sft.optimizer.lr=1e-3,-1"], script=tmp_path
        )
    with pytest.raises(ValueError, match=r"no setting has several values"):
        run_sweep(["experiment=smoke"], script=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_does_not_end_the_sweep_and_is_named(tmp_path, capfd):
    script = tmp_path / "recorder.py"
    script.write_text(RECORDER)
    with pytest.raises(SystemExit, match=r"2 of 4 runs have failed: sft\.optimizer\.lr=0\.003\+seed=0, "):
        run_sweep([*SWEPT, f"output_dir={tmp_path}/out"], script=script)
    assert len(list(tmp_path.glob("out/*/words.json"))) == 4
    page = tmp_path / "out/index.html"
    assert f"{page} compares the runs" in capfd.readouterr().err
    assert all(folder.name in page.read_text() for folder in tmp_path.glob("out/*/"))
    words = json.loads((tmp_path / "out/sft.optimizer.lr=0.001+seed=1/words.json").read_text())
    assert "seed=1" in words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_reaches_the_run_and_ends_the_sweep(number, tmp_path):
    script, parent = tmp_path / "waiting.py", tmp_path / "parent.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "here = pathlib.Path(sys.argv[0]).parent\n"
        "(here / 'started').touch()\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    (here / 'interrupted').touch()\n"
        if number == signal.SIGINT
        else "import pathlib, signal, sys\n"
        "here = pathlib.Path(sys.argv[0]).parent\n"
        "signal.signal(signal.SIGTERM, lambda *_: ((here / 'interrupted').touch(), sys.exit(1)))\n"
        "(here / 'started').touch()\nsignal.pause()\n"
    )
    parent.write_text(
        "import signal, sys\nfrom pathlib import Path\nfrom stages.setup.sweep import run_sweep\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"run_sweep({[*SWEPT, f'output_dir={tmp_path}/out']!r}, script=Path({str(script)!r}))\n"
    )
    root = str(Path(sweep.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, str(parent)],
        env={**os.environ, "PYTHONPATH": root},
        start_new_session=True,
        stderr=subprocess.PIPE,
    ) as process:
        while not (tmp_path / "started").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert (tmp_path / "interrupted").exists()
