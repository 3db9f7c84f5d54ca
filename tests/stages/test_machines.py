"""Runs on two and three machines, made of network namespaces: how they join, differ, wait for and lose each other."""

import json
import re
import shutil
import signal
import time

import pytest

from stages.setup import compare_hosts
from tests.forking import run_forked
from tests.machines import ROOT, machines, needs_machines, start_ranks, statuses, until
from tests.stages.test_pipeline import rows

pytestmark = needs_machines

SFT = ("experiment=smoke", "stage=sft", "tracking.report=false", "output_dir=out")
TWELVE = "sft.global_batch_size=12"
STEPS = (TWELVE, "sft.max_steps=8", "checkpoint.every=3", "checkpoint.best=false")
LONG = ("sft.max_steps=10000", "checkpoint.every=1", "launch.warn_after_s=2")
PRECISE = "sft.engine.precision=fp32"
STAGES = ("sft", "reward", "ppo")
COMPARED = ("train", "eval", "objective", "actor", "critic", "reward")


def logs(folder):
    return {file.name: file.read_text() for file in sorted(folder.glob("rank*"))}


def at_work(folder, *, after=-1):
    """Whether a checkpoint of a step above `after` is complete."""
    assert not any(errors(folder).values()), errors(folder)
    found = [int(path.name[5:]) for path in folder.glob("out/sft/checkpoints/step-??????")]
    return max(found, default=-1) > after


def errors(folder):
    return {name: next(iter(re.findall("^error: (.*)", text, re.M)), "") for name, text in logs(folder).items()}


@pytest.fixture(scope="module")
def three():
    with machines(3) as hosts:
        yield hosts


@pytest.fixture
def hosts(three, tmp_path):
    yield three
    for host in three:
        host.mounts = {seen: real for seen, real in host.mounts.items() if seen == "/etc/hosts"}
        host.signal(signal.SIGKILL)
    statuses(three, seconds=10)


def test_a_lost_machine_ends_the_job_and_the_rest_finish_it_as_one_process_would(hosts, tmp_path):
    start_ranks(hosts, *SFT, *STEPS, PRECISE, logs=tmp_path, counts=[1, 1, 1], cwd=tmp_path)
    until(lambda: at_work(tmp_path), seconds=400)
    hosts[2].signal(signal.SIGKILL)
    began = time.monotonic()
    assert statuses(hosts, seconds=400) == [1, 1, -signal.SIGKILL]
    assert time.monotonic() - began < 30
    for name in ("rank0", "rank1"):
        assert re.match(r"rank 2 \(pid \d+ on host3\): gone .* go on from the last checkpoint", errors(tmp_path)[name])
    for file in tmp_path.glob("rank*"):
        file.unlink()
    start_ranks(hosts[:2], *SFT, *STEPS, PRECISE, logs=tmp_path, counts=[2, 1], cwd=tmp_path)  # of unequal sizes
    assert statuses(hosts, seconds=400) == [0, 0, 0]
    assert "resuming after step" in logs(tmp_path)["rank0"]
    alone = run_forked("run_pipeline.py", *SFT[:-1], *STEPS, PRECISE, "output_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    ours, theirs = (rows(tmp_path / f"{name}/sft/metrics.jsonl") for name in ("out", "alone"))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for our, their in zip(ours, theirs, strict=True):
        for key in {"train/loss", "eval/loss", "actor/grad_norm"} & their.keys():
            assert our[key] == pytest.approx(their[key], abs=1e-5), (key, our["step"])
    (_, last) = (json.loads(line) for line in (tmp_path / "out/origin.jsonl").read_text().splitlines())
    assert last["ranks"] == 3


def test_all_stages_on_machines_of_which_one_is_slow_are_those_of_one_process(hosts, tmp_path):
    words = ("experiment=smoke", "tracking.report=false", *(f"{stage}.engine.precision=fp32" for stage in STAGES))
    start_ranks(hosts[:2], *words, "output_dir=out", logs=tmp_path, counts=[1, 1], cwd=tmp_path)
    end, running = time.monotonic() + 300, [*hosts[0].children, *hosts[1].children]
    while any(child.poll() is None for child in running):
        assert time.monotonic() < end, logs(tmp_path)
        for sent in (signal.SIGSTOP, signal.SIGCONT):  # the second machine has half of its time
            hosts[1].signal(sent)
            time.sleep(0.1)
    assert statuses(hosts, seconds=1) == [0, 0], logs(tmp_path)
    alone = run_forked("run_pipeline.py", *words, "output_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    for stage in STAGES:
        ours, theirs = (rows(tmp_path / name / stage / "metrics.jsonl") for name in ("out", "alone"))
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert our["step"] == their["step"]
            shared = {key for key in our.keys() & their.keys() if key.partition("/")[0] in COMPARED}
            assert shared or "eval/loss" not in our
            for key in shared:
                assert our[key] == pytest.approx(their[key], rel=1e-3, abs=1e-5), (stage, key, our["step"])


@pytest.mark.parametrize("lost", [0, 1])
def test_a_cut_cable_ends_the_job_on_both_sides_in_half_a_minute(hosts, tmp_path, lost):
    start_ranks(hosts[:2], *SFT, *LONG, TWELVE, logs=tmp_path, counts=[2, 1], cwd=tmp_path)
    until(lambda: at_work(tmp_path), seconds=400)
    hosts[lost].link("down")
    try:
        assert statuses(hosts, seconds=58) == [1, 1, 1]
    finally:
        hosts[lost].link("up")
    found = logs(tmp_path)
    for name in ("rank0", "rank1"):  # the store is on their side
        assert re.search(r"error: rank 2 \(pid \d+ on host2\): gone", found[name])
    assert re.search(r"rank 0('s| or its) machine \(10.77.0.1\), where the ranks meet, is gone", found["rank2"])


@pytest.mark.parametrize("slow", [0, 1])
def test_a_machine_that_stands_still_is_named_and_waited_for(hosts, tmp_path, slow):
    start_ranks(hosts[:2], *SFT, *LONG, logs=tmp_path, counts=[1, 1], cwd=tmp_path)
    until(lambda: at_work(tmp_path), seconds=400)
    before = {name: len(text) for name, text in logs(tmp_path).items()}
    hosts[slow].signal(signal.SIGSTOP)
    message = [
        r"rank 0's machine \(10.77.0.1\), where the ranks meet, has not answered for [23]",
        r"rank 1 \(pid \d+ on host2\) has (sent no heartbeat|not reached where others wait) for [23]",
    ][slow]
    waiting = f"rank{1 - slow}"
    until(lambda: re.search(message, logs(tmp_path)[waiting][before[waiting] :]), seconds=60)
    hosts[slow].signal(signal.SIGCONT)
    (newest,) = (path.name for path in tmp_path.glob("out/sft/checkpoints/step-??????"))
    until(lambda: at_work(tmp_path, after=int(newest[5:])), seconds=400)


@pytest.mark.parametrize("what", ["code", "files", "settings", "folder"])
def test_a_machine_that_differs_is_refused_before_any_work(hosts, tmp_path, what, monkeypatch):
    monkeypatch.setattr(compare_hosts, "_PATIENCE_S", 0.5)
    work, other = tmp_path / "work", tmp_path / "other"
    work.mkdir()
    (work / "rows.jsonl").write_text('{"prompt": "a", "completion": " b"}\n' * 20)
    shutil.copytree(work, other)
    (other / "rows.jsonl").write_text('{"prompt": "a", "completion": " c"}\n' * 20)
    (other / "types.py").write_text((ROOT / "rlhf/types.py").read_text() + "# changed\n")
    for folder in (work, other):
        (folder / "out").mkdir()
    data = ("data.sft.train=[rows.jsonl]", "data.sft.eval=[rows.jsonl]")
    mounts = {
        "code": {ROOT / "rlhf/types.py": other / "types.py"},
        "files": {work / "rows.jsonl": other / "rows.jsonl"},
        "folder": {work / "out": other / "out"},
    }
    hosts[1].mounts |= mounts.get(what, {})
    start_ranks(hosts[:1], *SFT, *data, logs=tmp_path, counts=[1], of=2, cwd=work)
    seed = ["seed=5"] if what == "settings" else []
    start_ranks(hosts[:2], *SFT, *data, *seed, logs=tmp_path, counts=[0, 1], first=1, of=2, cwd=work)
    assert statuses(hosts, seconds=400) == [1, 1]
    message = {
        "code": r"host2 \(rank 1\) differs from host1 \(rank 0\) in code: rlhf/types.py is \w+, on host1 \w+. Install",
        "files": r"host2 \(rank 1\) .* in files: data.sft.eval.0.path=rows.jsonl is .* Copy the files",
        "settings": r"host2 \(rank 1\) .* in settings: data\.\w+.*seed.* is 5, on host1 0|in settings: .*seed is 5",
        "folder": r"output_dir=.*: host1 and host2 do not see what the other writes",
    }[what]
    assert all(re.search(message, error) for error in errors(tmp_path).values()), logs(tmp_path)
    assert not list(work.glob("out/[!.]*"))


def test_torchrun_replaces_a_lost_machine_by_a_restart_on_those_that_are_left(hosts, tmp_path):
    for number, host in enumerate(hosts[:2], start=1):
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "1:2"]
        torchrun += ["--nproc-per-node", "1", "--max-restarts", "1"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "host1:29500", "--rdzv-conf", "last_call_timeout=2"]
        words = (*SFT, "sft.max_steps=12", "checkpoint.every=2")
        host.run(*torchrun, str(ROOT / "run_pipeline.py"), *words, log=tmp_path / f"rank{number}", cwd=tmp_path)
    until(lambda: at_work(tmp_path), seconds=400)
    hosts[1].signal(signal.SIGKILL)
    assert statuses(hosts, seconds=400) == [0, -signal.SIGKILL]
    assert re.search(r"error: rank 1 \(pid \d+ on host2\): gone", logs(tmp_path)["rank1"])
    assert "resuming after step" in logs(tmp_path)["rank1"]
    starts = [json.loads(line) for line in (tmp_path / "out/origin.jsonl").read_text().splitlines()]
    assert [start["ranks"] for start in starts] == [2, 1]
