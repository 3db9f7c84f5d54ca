"""Where a run comes from: the command, the machine and the versions of each of its starts, in `origin.jsonl`.

Left out: the environment's variables, which may hold keys.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.tracking.jsonl_log import Journal

if TYPE_CHECKING:
    import torch  # by whoever has a device: a command line is remembered before torch is needed

FILE = "origin.jsonl"
_COMMAND = "RLHF_COMMAND"  # in the environment, which ranks inherit: their own command line is not what was typed
_PACKAGES = ("torch", "transformers", "datasets", "peft", "wandb", "hydra-core", "numpy")
_SOURCES = Path(__file__).parents[2]


def remember_command() -> None:
    """Keep the command line of this process, which a person has typed, for the ranks that it may start."""
    os.environ[_COMMAND] = shlex.join(["python", *sys.argv])


def note_start(folder: Path, *, ranks: int, device: torch.device) -> None:
    """Add this start to the run in `folder`, which exists."""
    journal = Journal(folder / FILE, steps=False)
    journal.repair()
    journal.append(origin(ranks=ranks, device=device))


def origin(*, ranks: int, device: torch.device) -> dict[str, Any]:
    """What one would need to know to do the same again."""
    import torch

    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": os.environ.get(_COMMAND, ""),
        "ranks": ranks,
        "commit": _commit(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor()


def _commit() -> str:
    """The commit of these sources, with a plus where files were changed since; empty where they are no checkout."""
    if not (_SOURCES / ".git").exists():
        return ""
    commit, changed = (_git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--untracked-files=no"))
    return f"{commit}+" if changed else commit


def _git(*arguments: str) -> str:
    """What git answers; nothing where it is not installed or does not trust the folder."""
    try:
        done = subprocess.run(["git", "-C", str(_SOURCES), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
