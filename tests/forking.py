"""Runs a program of this repository in a fork of a process that has imported everything: starting python takes longest.

The process is started once by whoever tests, and forks for each program, which has its own arguments, folder,
environment and output and ends as any program does. It computes nothing itself, for a fork takes no threads along. What
a library reads from the environment while it is imported is that of the tests, so a test of such a variable, or of how
a program starts, starts python.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from importlib import import_module
from pathlib import Path

import torch

from rlhf.runtime import dist
from rlhf.runtime.process import VARIABLES, end_with_parent

ROOT = Path(__file__).parents[1]
STAGES = [f"stages.{stage}" for stage in ("sft", "reward", "dpo", "ppo", "eval")]
MODELS = ["transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"]
IMPORTED = ["pytest", "hydra", "stages.pipeline", *STAGES, *MODELS, "torch._dynamo"]


def run_forked(script, *words, ranks=1, cwd=ROOT, env=None):
    """`subprocess.run` of `python script *words`, which captures the output as text; on several ranks, of torchrun."""
    command = [str(ROOT / script), *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/{name}" for name in ("stdout", "stderr")]
        order = {"command": command, "ranks": ranks, "cwd": str(cwd), "env": dict(env or os.environ)}
        status = _answered(json.dumps(order | {"outputs": outputs}))
        return subprocess.CompletedProcess(command, status, *(Path(output).read_text() for output in outputs))


def _answered(order):
    server = _server()
    try:
        server.stdin.write(f"{order}\n")
        server.stdin.flush()
        return int(server.stdout.readline())
    except BaseException:  # such as the time limit of a test: whatever runs there ends, and the next one starts anew
        server.kill()
        _server.cache_clear()
        raise


@functools.cache
def _server():
    command, pipe = [sys.executable, "-m", "tests.forking"], subprocess.PIPE
    server = subprocess.Popen(command, cwd=ROOT, env=VARIABLES | os.environ, stdin=pipe, stdout=pipe, text=True)
    atexit.register(server.communicate)  # which has no more orders, so it ends
    return server


def _serve():
    """Answer orders until there are no more."""
    end_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who tests hears it as well, and ends us
    for module in IMPORTED:
        import_module(module)
    gc.freeze()  # or a fork's first collection would copy the pages of all modules
    for line in sys.stdin:
        server, child = os.getpid(), os.fork()
        if child == 0:
            end_with_parent(server)
            end_with(_become, json.loads(line), at_exit=_at_exit)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


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


def _become(order):
    command = order["command"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in enumerate([os.devnull, *order["outputs"]]):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = Path(os.devnull).open()  # noqa: SIM115 - open as long as the program runs
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.argv = command
    if order["ranks"] > 1:
        sys.exit(max(map(abs, fork_until_death(lambda rank: _run(command[0]), order["ranks"]))))
    _run(command[0])


def _run(script):
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _serve()
