"""Sweeps: one run after another for each value of a setting, as in `-m sft.optimizer.lr=1e-3,3e-3`.

Each run has its own process and a folder named after its values, below the folder of the sweep. The same command again
resumes what is unfinished. Left out: parallel runs, and searching.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from hydra.core.override_parser.types import Glob, Override

from rlhf.runtime.errors import RunError
from rlhf.runtime.process import end_with_parent
from stages.setup.command_line import check_overrides, choices_of, read_override

_LONGEST_NAME = 120


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    folder: Path
    """Folder of the sweep."""
    name: str
    """The values that distinguish it; also the name of its folder below the sweep's."""
    words: list[str]
    """Command line."""


def run_sweep(words: list[str], *, script: Path) -> None:
    """Run every combination of the values, name the runs that failed, and write a page that compares all.

    Args:
        words: overrides, of which some have several values.
        script: `run_pipeline.py`.

    Raises:
        ValueError: an override that no run could have; nothing has been started.
    """
    if "RANK" in os.environ:
        raise ValueError("-m under torchrun: a sweep starts its runs itself; expected python, with launch.ranks=N.")
    jobs = jobs_of(words)
    failed = []
    for number, job in enumerate(jobs, start=1):
        sys.stderr.write(f"\nrun {number} of {len(jobs)}: {job.folder / job.name}\n")
        if _finish([sys.executable, str(script), *job.words]) != 0:
            failed.append(job.name)
    for folder in dict.fromkeys(job.folder for job in jobs):
        sys.stderr.write(f"{_compare(folder)}\n")
    if failed:
        sys.exit(
            f"{len(failed)} of {len(jobs)} runs have failed: {', '.join(failed)}. The same command tries them again."
        )


def jobs_of(words: list[str]) -> list[Job]:
    """The runs of a sweep, each checked.

    Raises:
        ValueError: as `check_overrides`, or no setting has several values.
    """
    kept, swept = [], {}
    for word in words:
        override = read_override(word)  # None: `check_overrides` will explain what is wrong with it
        if override is None or not override.is_sweep_override():
            kept.append(word)
        else:
            swept[override.get_key_element()] = _values(override)
    if not swept:
        raise ValueError("-m: no setting has several values; expected one, such as sft.optimizer.lr=1e-4,3e-4.")
    found = [dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())]
    return [_job(kept, values) for values in found]


def _values(override: Override) -> list[str]:
    value = override.value()
    if isinstance(value, Glob):
        return value.filter(choices_of(override.key_or_group))
    return list(override.sweep_string_iterator())


def _job(kept: list[str], values: dict[str, str]) -> Job:
    """One run in its own folder, unless the sweep gives names or folders itself."""
    words = kept + [f"{setting}={value}" for setting, value in values.items()]
    run = check_overrides(words)
    folder = Path(run.output_dir)
    if {"name", "output_dir"} & set(values):
        return Job(folder.parent, folder.name, words)
    name = name_of(values)
    words = [word for word in words if word.partition("=")[0] not in ("name", "output_dir")]
    return Job(folder, name, [*words, f'name="{run.name}/{name}"', f'output_dir="{folder / name}"'])


def name_of(values: dict[str, str]) -> str:
    """A folder name made of settings and values, unique for them."""
    said = "+".join(f"{setting.lstrip('+')}={value}" for setting, value in values.items())
    name = re.sub(r"[^\w.=+-]+", "-", said, flags=re.ASCII)[:_LONGEST_NAME].strip("-.")
    return name if name == said else f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:6]}"


def _finish(command: list[str]) -> int:
    """Run a command to its end and return its exit status; an interruption is passed on to it once."""
    # The run ends when the sweep is killed; otherwise the next sweep would find its folder locked.
    before = partial(end_with_parent, os.getpid()) if sys.platform == "linux" else None
    with subprocess.Popen(command, preexec_fn=before) as process:

        def pass_on(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)
            raise KeyboardInterrupt

        earlier = signal.signal(signal.SIGTERM, pass_on)
        try:
            return process.wait()
        except KeyboardInterrupt:  # Ctrl-C has reached the run as well
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, earlier)


def _compare(folder: Path) -> str:
    """Write the page that compares the runs in `folder`; returns a line about it."""
    from rlhf.tracking.report.page import write_index  # matplotlib, not needed before

    try:
        return f"{write_index(folder)} compares the runs"
    except (ValueError, OSError, RunError) as error:
        return f"there is no page that compares the runs: {error}"
