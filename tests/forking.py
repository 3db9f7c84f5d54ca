"""Runs programs in forks of a process that has imported everything: starting python takes longest.

The process is started once by whoever tests, and forks for each program, which has its own arguments, folder,
environment and files and ends as any program does. It computes nothing itself, for a fork takes no threads along. What
a library reads from the environment while it is imported is that of the tests, so a test of such a variable, or of how
a program starts, starts python.
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from importlib import import_module
from pathlib import Path

import torch

from rlhf.runtime import dist
from rlhf.runtime.process import LAUNCHER, VARIABLES, end_with_parent
from tests.forked_program import start

ROOT = Path(__file__).parents[1]
STAGES = [f"stages.{stage}" for stage in ("sft", "reward", "dpo", "ppo", "eval")]
MODELS = ["transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"]
IMPORTED = ["pytest", "hydra", "stages.pipeline", *STAGES, *MODELS, "torch._dynamo"]


class Forked:
    """A program that runs: what `subprocess.Popen` has of it."""

    def __init__(self, order, files):
        self._answers = start(_server(), order, files).makefile()
        self.pid = int(self._answers.readline())
        self.returncode = None

    def poll(self):
        """The exit status, negative for a signal; None while it runs."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self):
        if self.returncode is None:
            self.returncode = int(self._answers.readline())
            self._answers.close()
        return self.returncode


def run_forked(script, *words, ranks=1, cwd=ROOT, env=None):
    """`subprocess.run` of `python script *words`, which captures the output as text; on several ranks, of torchrun."""
    command = [str(ROOT / script), *map(str, words)]
    order = {"command": command, "ranks": ranks, "cwd": str(cwd), "env": dict(env or os.environ)}
    order["executable"] = python()
    with (
        Path(os.devnull).open() as stdin,
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
    ):
        running = Forked(order, [file.fileno() for file in (stdin, stdout, stderr)])
        try:
            status = running.wait()
        except BaseException:  # such as the time limit of a test
            os.kill(running.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, status, *(_written(file) for file in (stdout, stderr)))


def _written(file):
    file.seek(0)
    return file.read()


def make_programs(folder, **programs):
    """Programs for a shell, which run here: names, and the words behind `python` that each of them stands for."""
    folder.mkdir(parents=True, exist_ok=True)
    client = shlex.join([sys.executable, "-ISE", str(ROOT / "tests/forked_program.py"), _server(), f"{folder}/python"])
    for name, words in {"python": "", **programs}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {client} {words} "$@"\n')
        (folder / name).chmod(0o755)


@functools.cache
def python():
    """The path of a program that stands for `python`."""
    make_programs(Path(_server()).parent)
    return str(Path(_server()).parent / "python")


@functools.cache
def _server():
    """The path of the socket of a server, which ends with this process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path, listener = f"{folder.name}/socket", socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(128)  # so that programs may ask from now on
    command = [sys.executable, "-m", "tests.forking", str(os.getpid()), str(listener.fileno())]
    subprocess.Popen(command, cwd=ROOT, env=VARIABLES | os.environ, pass_fds=[listener.fileno()])
    return path


def _serve(parent, listener):
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who tests hears it as well, and ends us
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how those who wait for programs end
    for module in IMPORTED:
        import_module(module)
    gc.freeze()  # or a fork's first collection would copy the pages of all modules
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            end_with(_run_for, connection)
        connection.close()


def _run_for(connection):
    """Run the program that is asked for, until it ends, or whoever has asked."""
    end_with_parent(_serving)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, *_ = socket.recv_fds(connection, 1, 3)
    order = json.loads(connection.makefile().readline())
    waiting, child = os.getpid(), os.fork()
    if child == 0:
        connection.close()
        end_with_parent(waiting)
        end_with(_become, order, files, at_exit=_at_exit)
    for file in files:
        os.close(file)
    connection.sendall(f"{child}\n".encode())
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def fork_until_death(work, ranks, *, alone=False):
    """Exit status of `work(rank)` in each forked rank, negative for a signal, which ends the others as well."""
    store, place = (None, {}) if alone else dist.host_store()
    children, parent = {}, os.getpid()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            end_with_parent(parent)
            if not alone:
                os.environ |= place | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            end_with(_work, work, rank)
        children[child] = rank
    statuses = [0] * ranks
    while children:
        child, status = os.wait()
        statuses[children.pop(child)] = os.waitstatus_to_exitcode(status)
        if status:  # as the launcher does
            for other in children:
                os.kill(other, signal.SIGKILL)
    del store  # the ranks met there
    return statuses


def _work(work, rank):
    torch.set_num_threads(1)
    work(rank)


def end_with(work, *args, at_exit=lambda: None):
    """Work, and end this fork: as python ends, but without taking apart what the fork shares with its parent."""
    status = 1
    try:
        work(*args)
        status = 0
    except SystemExit as end:  # with a status, or with a sentence, as `sys.exit` takes either
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stderr.write("" if isinstance(end.code, int | None) else f"{end.code}\n")
    except BaseException:  # noqa: BLE001 - whatever it was, this process must end here
        sys.excepthook(*sys.exc_info())
    finally:
        at_exit()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _at_exit():
    threading._shutdown()
    atexit._run_exitfuncs()


def _become(order, files):
    command = order["command"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # Those of the server remember what kind of file they had.
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1, errors="backslashreplace")
    faulthandler.enable()  # a crash prints where each thread was
    if "machine" in order:
        import_module("tests.machines").enter(*order["machine"])
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    if "PYTHONUNBUFFERED" in os.environ:
        sys.stdout.reconfigure(line_buffering=True)
    if "executable" in order:
        # What our launcher starts, and what torchrun does.
        sys.executable = os.environ["PYTHON_EXEC"] = order["executable"]
    if LAUNCHER in os.environ:
        os.environ[LAUNCHER] = str(os.getppid())  # it ends when the launcher's own child does
    if order.get("ranks", 1) > 1:
        sys.exit(max(map(abs, fork_until_death(lambda rank: _run(command), order["ranks"]))))
    _run(command)


def _run(words):
    """What `python *words` does."""
    first, *rest = [word for word in words[:1] if word != "-u"] + words[1:]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})  # noqa: S102 - as asked
    elif first == "-m":
        sys.argv = rest
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    _serving = os.getpid()
    _serve(int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
