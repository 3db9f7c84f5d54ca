"""The cores of a rank: a share of its own, on the NUMA node of its device, and as many threads as that has cores.

Without this, the threads of all ranks wander over all cores, and the optimizer's state in host memory is read across
NUMA nodes. What a launcher (Slurm, numactl, a container) allows is respected, and a binding of its own is kept.
See also: `launch.bind_cores` and `launch.threads`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.config.run_config import LaunchConfig
from rlhf.runtime.dist import World, gather_objects

log = logging.getLogger(__name__)

_SYSTEM = Path("/sys")
_ENOUGH = 2  # cores: a rank also has threads that copy, write and watch, which one core would keep waiting
Core = tuple[int, ...]
"""The numbers under which the system knows one core: several with hyper-threads."""


def use_cores(world: World, launch: LaunchConfig) -> None:
    """Bind this rank to its share of the cores and set its number of threads; all ranks must call it."""
    here = socket.gethostname()
    everyone = gather_objects((here, sorted(usable_cores()), numa_node_of(world.device)))  # a collective
    local = [rank for rank, (host, _, _) in enumerate(everyone) if host == here]
    allowed = [set(everyone[rank][1]) for rank in local]
    nodes, index = numa_nodes(allowed[0]), local.index(world.rank)
    shares = shares_of(nodes, near=[everyone[rank][2] for rank in local])
    is_bound = any(cores != allowed[0] for cores in allowed)  # each rank by the launcher
    limit = math.ceil(min(cpu_quota(), len(allowed[0])))  # what a container may take at a time
    wants = launch.bind_cores
    if wants is None:
        has_room = limit == len(allowed[0]) and all(len(share) >= _ENOUGH for share in shares)
        wants = len(local) > 1 and has_room
    if wants and not is_bound and all(shares):
        bind([number for core in shares[index] for number in core])
    elif launch.bind_cores:
        log.warning("launch.bind_cores=true: %s", _why_not(is_bound, cores=len(allowed[0]), ranks=len(local)))
    count = len(cores_of(usable_cores()))
    share = count if is_bound or len(usable_cores()) < len(allowed[0]) else min(count, limit) // len(local)
    threads = launch.threads or max(1, share)
    torch.set_num_threads(threads)
    if world.is_main and len(local) > 1:
        log.info("rank 0 of %s on this machine: cores %s, %s thread(s)", len(local), _ranges(usable_cores()), threads)


def _why_not(is_bound: bool, *, cores: int, ranks: int) -> str:
    if is_bound:
        return "the launcher has given each rank cores of its own, which are kept"
    return f"found {cores} core(s) for {ranks} ranks, expected one for each; they stay where they are"


def usable_cores() -> set[int]:
    """The cores that this process may use: those of its container, and of whoever bound it before."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))  # macOS


def bind(cores: Sequence[int]) -> None:
    """Keep all threads of this process, those that it has and those that it will start, to `cores`."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.sched_setaffinity(int(thread.name), cores)


def numa_nodes(allowed: set[int]) -> dict[int, list[Core]]:
    """The allowed cores of each NUMA node, by its number; all in node 0 where the system does not say."""
    found = {}
    for folder in (_SYSTEM / "devices/system/node").glob("node[0-9]*"):
        numbers = _numbers((folder / "cpulist").read_text()) & allowed
        if numbers:  # some nodes have memory alone
            found[int(folder.name.removeprefix("node"))] = cores_of(numbers)
    return dict(sorted(found.items())) or {0: cores_of(allowed)}


def cores_of(numbers: set[int]) -> list[Core]:
    """The cores behind `numbers`, hyper-threads of one core together."""
    cores = set()
    for number in numbers:
        file = _SYSTEM / f"devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        siblings = _numbers(file.read_text()) if file.exists() else {number}
        cores.add(tuple(sorted(siblings & numbers)))
    return sorted(cores)


def shares_of(nodes: dict[int, list[Core]], *, near: Sequence[int]) -> list[list[Core]]:
    """The cores of each rank of a machine: equally many of the node that it is near, or of one node in turn.

    Args:
        nodes: the cores of each node.
        near: the node of each rank's device; -1 where it has none.
    """
    numbers, ranks = list(nodes), len(near)
    if ranks < len(numbers) and not set(near) & set(numbers):  # several nodes for each rank
        cuts = [rank * len(numbers) // ranks for rank in range(ranks + 1)]
        return [
            [core for node in numbers[first:last] for core in nodes[node]]
            for first, last in zip(cuts, cuts[1:], strict=False)
        ]
    home = [node if node in nodes else numbers[rank * len(numbers) // ranks] for rank, node in enumerate(near)]
    shares = []
    for rank, node in enumerate(home):
        cores, place, sharing = nodes[node], home[:rank].count(node), home.count(node)
        shares.append(cores[place * len(cores) // sharing : (place + 1) * len(cores) // sharing])
    return shares


def numa_node_of(device: torch.device) -> int:
    """The NUMA node that a CUDA device hangs on; -1 for a CPU, and where the system does not say."""
    if device.type != "cuda":
        return -1
    known: Any = torch.cuda.get_device_properties(device)
    place = f"{known.pci_domain_id:04x}:{known.pci_bus_id:02x}:{known.pci_device_id:02x}.0"
    file = _SYSTEM / "bus/pci/devices" / place / "numa_node"
    return int(file.read_text()) if file.exists() else -1


def cpu_quota() -> float:
    """How many cores' time the container may take; infinite without a limit."""
    limits = [math.inf]
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = _SYSTEM / "fs/cgroup" / ("cpu" if controllers else "")
            group = root / path.lstrip("/")
            limits += [_quota_of(folder) for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return min(limits)


def _quota_of(folder: Path) -> float:
    """Cores' worth of time that one control group may take."""
    files = (folder / "cpu.max",), (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")  # cgroup 2, cgroup 1
    for group in files:
        if all(file.exists() for file in group):
            quota, period = " ".join(file.read_text() for file in group).split()
            return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    return math.inf


def _numbers(text: str) -> set[int]:
    """The numbers in a list such as `0-3,8`."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return {number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)}


def _ranges(numbers: set[int]) -> str:
    """The opposite of `_numbers`."""
    starts = [number for number in sorted(numbers) if number - 1 not in numbers]
    ends = [number for number in sorted(numbers) if number + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
