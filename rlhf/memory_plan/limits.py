"""Limits of a plan: what the configuration allows, and where it is silent, what this machine has free.

That is memory of the machine and of its control groups, memory of the device, and disk. Left out: swap, on which
nothing is planned.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from rlhf.config.roles import engines_of, roles_of
from rlhf.config.run_config import RunConfig
from rlhf.memory_plan.plan import Limits, Phase, Place, Plan
from rlhf.memory_plan.planner import SAVED
from rlhf.tracking.timing import resident

_ROOT = Path("/")
_FILES = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}  # of versions 2 and 1


def limits_of(run: RunConfig, device: torch.device, *, computes: bool = True) -> Limits:
    """The bytes that a plan may use.

    Args:
        run: says what it may use, and where it writes.
        device: that the plan is for.
        computes: this process is one of the ranks; one that only starts them stays beside them.

    Raises:
        ValueError: the plan is for a device that is not here, and the configuration does not say how large it is.
    """
    memory = run.memory
    allowed = None if memory.device_gb is None else int(memory.device_gb * 1e9)
    own = resident().get("RssAnon", 0) if computes else 0
    host = free_host() + own if memory.host_gb is None else int(memory.host_gb * 1e9)
    disk = _free_disk(run) if memory.disk_gb is None else int(memory.disk_gb * 1e9)
    if device.type != "cuda":  # the CPU is the device
        return Limits(None, host if allowed is None else min(host, allowed), disk)
    if allowed is None and not torch.cuda.is_available():
        raise ValueError(
            "memory.device_gb: this machine has no CUDA device to ask; say how large the one is that the plan is "
            "for, as in memory.device_gb=80 memory.host_gb=256."
        )
    return Limits(torch.cuda.get_device_properties(device).total_memory if allowed is None else allowed, host, disk)


def free_host(root: Path = _ROOT) -> int:
    """Bytes that are free without swapping, of the machine and of every control group of this process.

    Args:
        root: where `proc` and `sys` are.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return 1 << 62
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return min([free, *_free_in_groups(root)])


def _free_in_groups(root: Path) -> Iterator[int]:
    """What each control group that limits this process has left; pages of files go when memory is short."""
    for folder in _groups(root):
        for limit, used in _FILES.items():
            text = (folder / limit).read_text().strip() if (folder / limit).exists() else "max"
            if text != "max":
                yield int(text) - int((folder / used).read_text()) + _file_pages(folder / "memory.stat")


def _groups(root: Path) -> Iterator[Path]:
    """The control groups of this process and all above them, where they can be seen."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        below = top / path.lstrip("/")
        yield from (folder for folder in (below, *below.parents) if folder.is_relative_to(top))


def _file_pages(stat: Path) -> int:
    """Bytes of files that a group keeps in memory; version 1 counts those of its subgroups under names of their own."""
    fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    prefix = "total_" if "total_inactive_file" in fields else ""
    return sum(int(fields.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def full_disks(run: RunConfig, plan: Plan) -> list[str]:
    """A sentence for each file system that has no room for its part of a stage, though all together might have."""
    roles = roles_of(run, str(run.stage_of(plan.stage)))
    disks = {role.name: role.engine_config(run).nvme_path for role in roles}

    def bytes_below(folder: str, phase: Phase) -> int:
        on_disk = [item for item in phase.items if item.place is Place.disk]
        folders = (run.output_dir if item.part in SAVED else disks[item.role] for item in on_disk)
        return sum(item.bytes for item, own in zip(on_disk, folders, strict=True) if own == folder)

    by_mount: dict[Path, list[str]] = defaultdict(list)
    for folder in dict.fromkeys(filter(None, [run.output_dir, *disks.values()])):
        by_mount[_mount(Path(folder))].append(folder)
    sentences = []
    for folders in by_mount.values():
        needed = sum(plan.ranks * max(bytes_below(folder, phase) for phase in plan.phases) for folder in folders)
        free = _free_at(Path(folders[0]))
        if free < needed:
            setting = "output_dir" if folders[0] == run.output_dir else "engine.nvme_path"
            sentences.append(
                f"{plan.stage}: {setting}={folders[0]}: found {free / 1e9:.2f} GB free, "
                f"expected {needed / 1e9:.2f} GB; free space there, or name a folder on a larger disk."
            )
    return sentences


def _free_disk(run: RunConfig) -> int:
    """Bytes on the file systems that the run writes to."""
    disks = [engine.nvme_path for stage in run.stages for engine in engines_of(run, stage).values()]
    folders = [Path(folder) for folder in (run.output_dir, *disks) if folder]
    return sum({_mount(folder): _free_at(folder) for folder in folders}.values())


def _mount(folder: Path) -> Path:
    """Where the file system of a folder begins; the folder need not be there yet."""
    there = _existing(folder).resolve()
    return next(path for path in (there, *there.parents) if path.is_mount())


def _free_at(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
