"""The ranks of this machine: how they end, by themselves, with their launcher, and when they wait for each other."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.config.run_config import LaunchConfig
from rlhf.runtime import dist, launch

ROOT = Path(__file__).parents[2]
TWO = LaunchConfig(ranks=2)


def script(folder, text):
    file = folder / "rank.py"
    file.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{text}\n")
    return file


def listening(pid):
    """Addresses, as the kernel writes them, on which a process listens."""
    own = {str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()}
    rows = [row.split() for table in ("tcp", "tcp6") for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, *, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ranks_that_end_well_have_no_message(tmp_path):
    text = "open(f'{sys.argv[1]}/{rank}', 'w').write(os.environ['WORLD_SIZE'] + os.environ['LOCAL_WORLD_SIZE'])"
    assert launch.run_ranks(script(tmp_path, text), str(tmp_path), launch=TWO) == ""
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["22", "22"]


@pytest.mark.parametrize(
    ("death", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 was killed (SIGKILL, often out of memory)"),
        ("os.kill(os.getpid(), signal.SIGBUS)", "rank 1 was killed (SIGBUS, often a full /dev/shm or disk)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "rank 1 was killed (SIGSEGV, a crash in compiled code)"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 1)", f"rank 1 was killed (signal {signal.SIGRTMIN + 1})"),
        ("sys.exit(3)", "rank 1 has failed: its own error is above"),
    ],
)
def test_a_lost_rank_is_named_with_its_signal_and_the_others_end(tmp_path, monkeypatch, death, message):
    monkeypatch.setattr(launch, "_GRACE_S", 0.2)
    text = f"if rank == 1:\n    {death}\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(600)"
    assert launch.run_ranks(script(tmp_path, text), str(tmp_path / "pid"), launch=TWO) == message
    assert not (tmp_path / "pid").exists() or not is_running((tmp_path / "pid").read_text())


def test_the_rank_that_was_killed_is_named_and_not_those_that_failed_because_of_it():
    assert launch._failure([1, None, -9, 1]) == "rank 2 was killed (SIGKILL, often out of memory)"
    assert launch._failure([0, None, 0, 0]) == ""


def test_the_others_have_time_to_log_their_own_errors(tmp_path):
    text = "if rank == 1:\n    sys.exit(1)\ntime.sleep(1)\nopen(sys.argv[1], 'w')"
    assert launch.run_ranks(script(tmp_path, text), str(tmp_path / "message"), launch=TWO)
    assert (tmp_path / "message").exists()


def test_ranks_that_never_join_are_named_and_end_with_the_time(tmp_path, caplog):
    short = LaunchConfig(ranks=2, warn_after_s=0.2, timeout_s=0.5)
    text = "open(f'{sys.argv[1]}/{rank}', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    message = launch.run_ranks(script(tmp_path, text), str(tmp_path), launch=short)
    assert "rank 0 has not joined" in caplog.text
    assert "rank 1 has not joined" in message
    assert "longer than launch.timeout_s=0.5" in message
    assert not any(is_running(file.read_text() or 0) for file in tmp_path.glob("[01]"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ranks_that_still_import_end_with_their_launcher(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "if 'RANK' in os.environ:\n"
        f"    open({str(tmp_path)!r} + '/pid' + os.environ['RANK'], 'w').write(f'{{os.getpid()}} ')\n"
        "    time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    launcher = os.fork()
    if launcher == 0:
        launch.run_ranks(script(tmp_path, ""), launch=TWO)
        os._exit(0)
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    until(lambda: all(file.exists() and file.read_text().endswith(" ") for file in files))
    ranks = [int(file.read_text()) for file in files]
    assert all(map(is_running, ranks))
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    until(lambda: not any(map(is_running, ranks)))


def test_ranks_end_where_the_launcher_was_gone_before_they_could_ask(tmp_path):
    child = os.fork()
    if child == 0:
        launch.end_with_parent(os.getpid())  # nobody's parent
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_meeting_place_of_one_machine_is_closed_to_others():
    before = listening(os.getpid())
    store, place = dist.host_store()
    assert listening(os.getpid()) - before <= {"0100007F"}
    with socket.create_connection((place["MASTER_ADDR"], int(place["MASTER_PORT"]))):
        pass
    del store


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ranks_of_torchrun_end_with_it_also_while_they_import(tmp_path, monkeypatch):
    (tmp_path / "hydra.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}} ')\ntime.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    torchrun = os.fork()
    if torchrun == 0:
        subprocess.run([sys.executable, str(ROOT / "run_pipeline.py")], check=False)
        os._exit(0)
    file = tmp_path / "pid"
    until(lambda: file.exists() and file.read_text().endswith(" "))
    os.kill(torchrun, signal.SIGKILL)
    os.waitpid(torchrun, 0)
    until(lambda: not is_running(int(file.read_text())))
