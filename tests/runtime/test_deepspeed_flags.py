"""The flags of DeepSpeed's launcher become settings of a run here, or commands of torchrun for each host."""

import os
import shlex

import pytest
from torch.distributed.run import get_args_parser

from rlhf.runtime import deepspeed_flags
from rlhf.runtime.deepspeed_flags import apply_flags, has_flags, read_flags

PROGRAM = ["-m", "run_pipeline"]


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("alpha slots=4\nbeta slots=2\n")
    return "hosts"


def printed(words, capsys):
    """What torchrun reads from each printed command, by host, after the variables in front of it."""
    with pytest.raises(SystemExit) as end:
        apply_flags(read_flags(words), program=PROGRAM)
    assert "Nothing has been started" in end.value.code
    lines = capsys.readouterr().out.splitlines()
    found = {}
    for host, line in zip(lines[::2], lines[1::2], strict=True):
        before, _, after = line.partition("torchrun ")
        found[host.removeprefix("# ")] = before.strip(), get_args_parser().parse_args(shlex.split(after))
    return found


@pytest.mark.parametrize("flag", ["--num_gpus", "--num_accelerators"])
def test_devices_of_this_machine_become_ranks(hosts, flag):
    assert apply_flags(read_flags(["stage=sft", flag, "2", "seed=1"]), program=PROGRAM) == [
        "stage=sft", "seed=1", "launch.ranks=2"
    ]  # fmt: skip
    assert apply_flags(read_flags([f"{flag}=2"]), program=PROGRAM) == ["launch.ranks=2"]


def test_every_host_gets_a_command_that_torchrun_understands(hosts, capsys):
    found = printed(["--hostfile", hosts, "stage=[sft,reward]", "name=it's"], capsys)
    assert list(found) == ["alpha", "beta"]
    for rank, (host, ranks) in enumerate({"alpha": "4", "beta": "2"}.items()):
        before, read = found[host]
        assert before == ""
        assert (read.nnodes, read.nproc_per_node, read.node_rank) == ("2", ranks, rank)
        assert (read.master_addr, read.master_port) == ("alpha", 29500)
        assert (read.module, read.training_script) == (True, "run_pipeline")
        assert read.training_script_args == ["stage=[sft,reward]", "name=it's"]


def test_chosen_devices_and_the_place_to_meet_are_in_the_commands(hosts, capsys):
    words = ["-H", hosts, "-i", "beta:1@alpha:0,3", "--master_addr", "10.0.0.1", "--master_port", "1234"]
    found = printed(words, capsys)
    assert {host: before for host, (before, _) in found.items()} == {
        "alpha": "CUDA_VISIBLE_DEVICES=0,3",
        "beta": "CUDA_VISIBLE_DEVICES=1",
    }
    assert {(read.nproc_per_node, read.master_addr, read.master_port) for _, read in found.values()} == {
        ("2", "10.0.0.1", 1234),
        ("1", "10.0.0.1", 1234),
    }


def test_an_elastic_job_has_a_range_of_hosts_and_restarts(hosts, capsys):
    found = printed(["--hostfile", hosts, "--elastic_training", "--num_gpus", "2"], capsys)
    for _, read in found.values():
        assert (read.nnodes, read.rdzv_backend, read.rdzv_endpoint) == ("1:2", "c10d", "alpha:29500")
        assert read.max_restarts > 0


def test_the_top_hosts_and_hosts_without_names(hosts, capsys):
    found = printed(["--hostfile", hosts, "--num_nodes", "1"], capsys)
    assert list(found) == ["alpha"]
    found = printed(["--num_nodes", "2", "--num_gpus", "8", "--master_addr", "alpha"], capsys)
    assert [read.node_rank for _, read in found.values()] == [0, 1]


def test_one_host_that_is_this_one_runs_here(hosts, tmp_path):
    (tmp_path / "own").write_text(f"{os.uname().nodename} slots=3\nother slots=3\n")
    words = ["--hostfile", "own", "--num_nodes", "1", "seed=1"]
    assert apply_flags(read_flags(words), program=PROGRAM) == ["seed=1", "launch.ranks=3"]


def test_with_a_node_rank_torchrun_replaces_this_process(hosts, monkeypatch):
    started = []

    def execv(program, words):
        started.append(words)
        raise SystemExit  # this process would be another program now

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(SystemExit):
        apply_flags(read_flags(["--hostfile", hosts, "-e", "beta:0", "--node_rank", "1", "--no_ssh"]), program=PROGRAM)
    read = get_args_parser().parse_args(started[0][3:])
    assert (read.node_rank, read.nproc_per_node, os.environ["CUDA_VISIBLE_DEVICES"]) == (1, "1", "1")


def test_devices_are_counted_where_some_are_left_out(hosts, monkeypatch):
    monkeypatch.setattr(deepspeed_flags, "_device_count", lambda: 4)
    launch = read_flags(["--exclude", "localhost:1"])
    assert (launch.hosts, launch.devices("localhost")) == (
        {"localhost": [0, 2, 3]},
        {"CUDA_VISIBLE_DEVICES": "0,2,3"},
    )


def test_what_deepspeeds_own_launcher_adds_is_read(hosts, monkeypatch):
    assert has_flags(["--local_rank=1", "stage=sft"])
    monkeypatch.setenv("RANK", "1")
    assert apply_flags(read_flags(["--local_rank=1", "stage=sft"]), program=PROGRAM) == ["stage=sft"]
    with pytest.raises(ValueError, match="--num_gpus: the ranks were started already"):
        read_flags(["--num_gpus", "2"])


def test_a_command_line_without_flags_has_none():
    assert not has_flags(["stage=sft", "-m", "--cfg", "job", "name=--num_gpus"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_gpus", "two"], "found 'two', expected a number"),
        (["--num_gpus"], "expected one argument"),
        (["--num_gpus", "0"], "0 host|--num_gpus 0|no GPU"),
        (["--num_gpus", "2", "launch.ranks=2"], "launch.ranks=2: the flags of DeepSpeed say"),
        (["--num_gpus", "2", "--include", "localhost:0"], "--include and --num_gpus: expected one of them"),
        (["--hostfile", "hosts", "--num_gpus", "3"], "beta has 2 slots"),
        (["--hostfile", "hosts", "--num_nodes", "3"], "found 2 host"),
        (["--hostfile", "hosts", "--node_rank", "2"], "found 2 hosts, expected less"),
        (["--num_nodes", "2", "--num_gpus", "8"], "--master_addr: missing"),
        (["--num_nodes", "2"], "expected --hostfile, or --num_gpus"),
        (["--elastic_training"], "expected hosts"),
        (["--launcher=slurm"], "nothing is started on other hosts"),
        (["--enable_each_rank_log", "logs"], "--redirects 3 --log-dir"),
        (["--bind_core_list", "a-b"], "expected numbers and ranges"),
        (["--bind_core_list", "100000"], "core 100000 is not one that this process may use"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(hosts, words, message):
    with pytest.raises(ValueError, match=message):
        apply_flags(read_flags(words), program=PROGRAM)
