"""What the sections of `python -m benchmarks.gpu` share: a device, a folder, the time that is left, and processes.

Whatever computes runs in a process of its own, so that memory that ran out or a device that raised an assertion is gone
with it, and every peak starts from nothing. Left out: what is measured (the sections), and the report (`gpu.py`).

    python -m benchmarks.gpu_bench MODULE FUNCTION JSON OUT       what such a process runs
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
_ENDS_WITH_US = """
import os, sys
from rlhf.runtime.process import end_with_parent
end_with_parent(int(sys.argv[1]))
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""What a process runs first, and not between fork and exec: in a fork of a process with threads Python frees what
the others had, and for a process group of gloo that would wait for ever."""
ALONE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false", "HYDRA_FULL_ERROR": "1"}
"""No network, whatever this shell has set."""
_LAST = 4000  # characters of a process's output that are shown when it fails


class Tried(NamedTuple):
    """A result, or why there is none."""

    value: Any
    error: str = ""
    skipped: str = ""

    @property
    def reason(self) -> str:
        """The same in one cell of a table."""
        if not self.error:
            return self.skipped and f"skipped: {self.skipped}"
        first, *rest = self.error.splitlines()
        raised = [line for line in rest if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return f"failed: {[first, *raised][-1][:120].replace('|', '/')}"


@dataclass(frozen=True)
class Bench:
    """Where and how long sections run."""

    device: str
    """cuda, or cpu: toy sizes, which show that the command works."""
    folder: Path
    """For files, on a local disk."""
    ends: float
    """On the clock of `time.monotonic`."""
    isolated: bool = True
    """False calls functions in this process, for tests."""

    @property
    def toy(self) -> bool:
        """Whether sizes are those of a CPU."""
        return self.device == "cpu"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def within(self, seconds: float) -> Bench:
        """The same with no more than so many seconds, but at toy sizes, where a busy machine may be slow."""
        return self if self.toy else replace(self, ends=min(self.ends, time.monotonic() + seconds))

    def call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """The result of a module's function, arguments and result being JSON, from a process of its own.

        Raises:
            RuntimeError: it failed, or took longer than there is time; the end of its output.
        """
        if not self.isolated:
            return function(**arguments)
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            out = Path(name) / "result.json"
            words = [function.__module__, function.__name__, json.dumps(arguments), str(out)]
            self.run([sys.executable, "-m", "benchmarks.gpu_bench", *words])
            return json.loads(out.read_text())

    def run(self, command: Sequence[str], *, allowed: Sequence[int] = (0,)) -> str:
        """What a command writes to both its streams; it and all it has started are killed when the time is over.

        Raises:
            RuntimeError: its exit status is none of `allowed`, or the time was over.
        """
        others = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
        environment = {name: value for name, value in os.environ.items() if name not in others} | ALONE
        before = time.monotonic()
        with tempfile.TemporaryFile("w+", errors="replace", dir=self.folder) as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _ENDS_WITH_US, str(os.getpid()), *command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(timeout=max(self.left, 0))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            log.seek(0)
            output = log.read()
        if status not in allowed:
            took = time.monotonic() - before
            how = f"ended with {status}" if status is not None else f"was stopped after {took:.0f} s: no time is left"
            raise RuntimeError(f"{_name(command)} {how}\n\n{output[-_LAST:].strip()}")
        return output

    def attempt(self, job: Callable[[], Any]) -> Tried:
        """What a job returns, or why it failed."""
        try:
            return Tried(job())
        except RuntimeError as error:
            return Tried(None, str(error))

    def together(self, jobs: dict[str, Callable[[], Any]]) -> dict[str, Tried]:
        """`attempt` for each job, several at once where they are processes: for what is not timed."""
        with ThreadPoolExecutor(min(6, os.cpu_count() or 1) if self.isolated else 1) as threads:
            return dict(zip(jobs, threads.map(self.attempt, jobs.values()), strict=True))


def failures(tried: dict[str, Tried]) -> str:
    """What went wrong in full, below a table."""
    return "".join(f"\n\n{name} failed:\n\n```\n{one.error}\n```" for name, one in tried.items() if one.error)


def seconds(work: Callable[[], Any], *, device: str, rounds: int = 5) -> float:
    """Median seconds of `work` after one round to warm up; on CUDA between events of the current stream."""
    work()
    found = []
    for _ in range(rounds):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def _name(command: Sequence[str]) -> str:
    """The module or script that a command runs, and for ours the function."""
    words = [word for word in command[1:] if word != "-m"]
    return ".".join(words[1:3]) if words[0] == "benchmarks.gpu_bench" else Path(words[0]).name


def main() -> None:
    """Call one function, and leave what it returns."""
    module, name, arguments, out = sys.argv[1:]
    result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
