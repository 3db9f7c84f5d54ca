"""Compares the machines of a run before any work: code, versions, settings, data and models, and the output folder.

Ranks with different code or data would wait for each other in different collectives, or train on something else
without a word. One rank of each machine looks. Files above 64 MB are compared by size and 64 pieces of 1 MiB, evenly
spaced, because a model may have a hundred times as much.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from rlhf.config.bounds import as_plain
from rlhf.config.engine_config import Precision
from rlhf.config.run_config import RunConfig
from rlhf.engine.materialize import working_dtype
from rlhf.runtime.dist import World, barrier, gather_objects
from stages.lifecycle.stage_settings import flat_settings

_SOURCES = Path(__file__).parents[2]
_CODE = ("rlhf", "stages", "data", "conf", "run_pipeline.py")
_LIBRARIES = ("torch", "transformers", "datasets", "peft", "safetensors", "numpy")
_PLACES = ("output_dir", "nvme_path", "name")
"""Settings that are written to, whatever is there."""
_WHOLE, _PIECES, _PIECE = 64 << 20, 64, 1 << 20
_PATIENCE_S = 10.0  # for a network file system, which may show new files late
_MISSING = "missing"
_ADVICE = {
    "code": "Install the same version of this program on both.",
    "versions": "Install the same versions on both.",
    "settings": "Start the same command in the same folder on both.",
    "files": "Copy the files from one to the other.",
}
Facts = dict[str, dict[str, str]]
"""What must be the same everywhere: by group of `_ADVICE`, the name of each thing and its content or fingerprint."""


def compare_hosts(run: RunConfig, world: World) -> None:
    """Refuse machines that differ from the first rank's; all ranks must call it.

    Raises:
        ValueError: the first machine that differs, in what, and what to do.
    """
    leaders = _leaders()
    if len(leaders) == 1:
        return
    everyone = gather_objects(facts_of(run, world) if world.rank in leaders else {})  # a collective
    for rank, host in leaders.items():
        for group, advice in _ADVICE.items():
            differing = _differences(everyone[rank][group], everyone[0][group], on=leaders[0])
            if differing:
                raise ValueError(
                    f"{host} (rank {rank}) differs from {leaders[0]} (rank 0) in {group}: {'; '.join(differing[:3])}"
                    f"{f' and {len(differing) - 3} more' * (len(differing) > 3)}. {advice}"
                )


def check_shared(run: RunConfig, world: World) -> None:
    """Find out whether every machine sees what the others write to the output folder; all ranks must call it.

    Raises:
        ValueError: some do not, and what to set.
    """
    leaders = _leaders()
    if len(leaders) == 1:
        return
    folder, token = Path(run.output_dir), gather_objects(os.urandom(8).hex())[0]  # the first rank's
    probes = {rank: folder / f".probe-{token}-{rank}" for rank in leaders}
    if world.rank in leaders and folder.is_dir():  # made by the first rank; elsewhere it would only hide that it is not
        with contextlib.suppress(OSError):  # others will not see it
            probes[world.rank].touch()
    barrier()  # all probes have been written
    unseen = gather_objects(_unseen(probes) if world.rank in leaders else [])  # a collective
    barrier()
    if world.rank in leaders:
        probes[world.rank].unlink(missing_ok=True)
    blind = [leaders[rank] for rank in leaders if 0 in unseen[rank] or rank in unseen[0]]
    if blind:
        raise ValueError(
            f"output_dir={folder}: {leaders[0]} and {', '.join(blind)} do not see what the other writes there. Models "
            "and checkpoints pass through this folder: set output_dir= to one on a file system that all machines "
            "share, such as NFS or Lustre. Data, models, caches and engine.nvme_path may be on local disks."
        )


def _leaders() -> dict[int, str]:
    """The first rank of each machine and the machine's name, rank 0 first."""
    found = gather_objects((os.environ.get("LOCAL_RANK", "0"), socket.gethostname()))  # a collective
    return {rank: host for rank, (local_rank, host) in enumerate(found) if local_rank == "0"}


def _unseen(probes: dict[int, Path]) -> list[int]:
    """The ranks whose probes do not appear here."""
    end = time.monotonic() + _PATIENCE_S
    while (missing := [rank for rank, probe in probes.items() if not probe.exists()]) and time.monotonic() < end:
        time.sleep(0.2)
    return missing


def facts_of(run: RunConfig, world: World) -> Facts:
    """What this machine has of all that must be the same everywhere."""
    sources = [path for name in _CODE for path in _files_below(_SOURCES / name) if path.suffix != ".pyc"]
    settings = flat_settings(as_plain(run), "")
    return {
        "code": {path.relative_to(_SOURCES).as_posix(): fingerprint(path) for path in sources},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
            # What `engine.precision=auto` becomes.
            "device": f"{world.device.type}, {working_dtype(Precision.auto, world.device)}",
        },
        "settings": {name: str(value) for name, value in settings.items()},
        "files": dict(_named_files(settings, Path(run.output_dir))),
    }


def _named_files(settings: dict[str, Any], output: Path) -> Iterator[tuple[str, str]]:
    """Fingerprints of all files and folders that settings name, but for those of the run itself."""
    named = [
        (name, text) for name, value in settings.items() for text in (value if isinstance(value, list) else [value])
    ]
    for name, text in named:
        path = _file_of(text) if isinstance(text, str) and name.rpartition(".")[2] not in _PLACES else None
        if path is not None and not path.absolute().is_relative_to(output):
            yield f"{name}={text}", fingerprint(path)


def _file_of(text: str) -> Path | None:
    """The file or folder that a text names: itself, the module of a function, or what the hub's cache has of an id."""
    module, colon, _ = text.rpartition(":")
    named = [text, module, f"{module.replace('.', '/')}.py"] if colon else [text]
    cached = [f"{HF_HUB_CACHE}/{kind}--{text.replace('/', '--')}/refs/main" for kind in ("models", "datasets")]
    with contextlib.suppress(OSError):  # a text that is too long for a name
        paths = [Path(name).expanduser() for name in (*named, *cached)]
        return next((path for path in paths if path.exists() and path != Path()), None)
    return None


def _files_below(path: Path) -> list[Path]:
    """The file itself, or all files in a folder, sorted; not what starts with a dot."""
    if path.is_file():
        return [path]
    return [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file.relative_to(path))]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def fingerprint(path: Path) -> str:
    """A short hash of a file, or of all files in a folder and their names."""
    digest = hashlib.sha256()
    try:
        for file in _files_below(path):
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
            for piece in _pieces(file):
                digest.update(piece)
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return digest.hexdigest()[:12]


def _pieces(file: Path) -> Iterator[bytes]:
    """What is compared of a file: all of it, or, of a large one, some of it from the beginning to the end."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= _WHOLE:
            yield opened.read()
            return
        for number in range(_PIECES):
            opened.seek(number * (size - _PIECE) // (_PIECES - 1))
            yield opened.read(_PIECE)


def _differences(found: dict[str, str], expected: dict[str, str], *, on: str) -> list[str]:
    """What is not the same in both; `expected` is of the machine `on`."""
    names = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    return [f"{name} is {found.get(name, _MISSING)}, on {on} {expected.get(name, _MISSING)}" for name in names]
