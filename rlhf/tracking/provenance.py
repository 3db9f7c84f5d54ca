"""Records where a run comes from: command, machine and versions of each of its starts, in `origin.jsonl`.

Left out: environment variables, which may hold keys.
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

from rlhf.tracking.jsonl_log import JsonlLog

if TYPE_CHECKING:
    import torch  # heavy: the launcher remembers its command line without it

FILE = "origin.jsonl"
_COMMAND = "RLHF_COMMAND"  # an environment variable, which ranks inherit: their own command line is not what was typed
_PACKAGES = ("torch", "transformers", "datasets", "peft", "wandb", "hydra-core", "numpy")
_SOURCES = Path(__file__).parents[2]


def remember_command() -> None:
    """Keep this process's command line, which a person typed, for the ranks that it may start."""
    program = Path(sys.argv[0])
    words = ["python", sys.argv[0]] if program.suffix == ".py" else [program.name]
    os.environ[_COMMAND] = shlex.join([*words, *sys.argv[1:]])


def record_start(folder: Path, *, ranks: int, device: torch.device) -> None:
    """Append this start to `origin.jsonl` of the run in `folder`, which exists."""
    starts = JsonlLog(folder / FILE, steps=False)
    starts.repair()
    starts.append(provenance(ranks=ranks, device=device))


def provenance(*, ranks: int, device: torch.device) -> dict[str, Any]:
    """Everything one needs to know to start the same run again."""
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
        **{name: version_of(name) for name in _PACKAGES},
    }


def version_of(package: str) -> str:
    """The version of a package that is installed; a checkout that is run as it is has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The commit of these sources, with a plus if files were changed since; empty if they are no checkout."""
    if not (_SOURCES / ".git").exists():
        return ""
    words = ["git", "-C", str(_SOURCES), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # git is not installed
        return ""
