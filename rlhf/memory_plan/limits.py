"""Limits of a plan, and what to change in a run that exceeds them.

The limits are what the configuration allows, and where it is silent, what this machine has free: memory of the machine
and of its control groups, memory of the device, and disk. Left out: swap, on which nothing is planned.

Changes that leave results alone are tried first, in the order of what they cost in time. Then come types that round,
in the order of how much, and only then a disk, which is many times slower; adapters, which learn something else, come
last. Left out: fewer tokens or other models, which are the user's to decide.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf.config.engine_config import EngineConfig, GradDtype, MasterWeights, MomentDtype, OffloadDevice, Precision
from rlhf.config.roles import engines_of, roles_of
from rlhf.config.run_config import RunConfig
from rlhf.memory_plan.plan import Limits, Place, Plan
from rlhf.memory_plan.planner import SAVED
from rlhf.tracking.timing import resident

_ROOT = Path("/")
_FILES = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}  # of versions 2 and 1
_LORA_RANK = 16
_ZERO = "engine.zero_stage"


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
    free = int(_fields(meminfo)["MemAvailable:"]) * 1024
    return min([free, *(left for folder in _groups(root) for left in _left_in(folder))])


def _left_in(group: Path) -> Iterator[int]:
    """What a control group has left, if it has a limit; its pages of files go when memory is short."""
    for limit, used in _FILES.items():
        text = (group / limit).read_text().strip() if (group / limit).exists() else "max"
        if text != "max":
            pages = _fields(group / "memory.stat")
            prefix = "total_" if "total_inactive_file" in pages else ""  # version 1 counts subgroups apart
            cached = sum(int(pages.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            yield int(text) - int((group / used).read_text()) + cached


def _groups(root: Path) -> Iterator[Path]:
    """The control groups of this process and all above them, where they can be seen."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        below = top / path.lstrip("/")
        yield from (folder for folder in (below, *below.parents) if folder.is_relative_to(top))


def _fields(file: Path) -> dict[str, str]:
    """The first two words of each line; nothing where there is no such file."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {words[0]: words[1] for words in map(str.split, lines)}


def full_disks(run: RunConfig, plan: Plan) -> list[str]:
    """A sentence for each file system that has no room for its part of a stage, though all together might have."""
    roles = roles_of(run, str(run.stage_of(plan.stage)))
    disks = {role.name: role.engine_config(run).nvme_path for role in roles}
    needed: Counter[str | None] = Counter()
    for phase in plan.phases:
        held: Counter[str | None] = Counter()
        for item in phase.items:
            if item.place is Place.disk:
                held[run.output_dir if item.part in SAVED else disks[item.role]] += plan.ranks * item.bytes
        needed |= held  # the most of any phase
    by_mount: dict[Path, list[str]] = defaultdict(list)
    for folder in dict.fromkeys(filter(None, [run.output_dir, *disks.values()])):
        by_mount[_mount(Path(folder))].append(folder)
    sentences = []
    for folders in by_mount.values():
        free, wanted = _free_at(Path(folders[0])), sum(needed[folder] for folder in folders)
        if free < wanted:
            setting = "output_dir" if folders[0] == run.output_dir else "engine.nvme_path"
            sentences.append(
                f"{plan.stage}: {setting}={folders[0]}: found {free / 1e9:.2f} GB free, "
                f"expected {wanted / 1e9:.2f} GB; free space there, or name a folder on a larger disk."
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


class Change(NamedTuple):
    """Settings that take less memory, and what they cost."""

    cost: str
    settings: dict[str, Any]
    """By their name below the stage, or that of `checkpoint`; those of `engine` hold for every role's engine."""


def cheapest_changes(
    run: RunConfig, stage: str, *, plan: Callable[[RunConfig], Plan], limits: Limits, ranks: int
) -> list[Change]:
    """The first changes that together make the stage fit, without those that are not needed; empty if none do.

    Args:
        run: does not fit.
        stage: which does not.
        plan: plans the stage of a run.
        limits: what there is.
        ranks: of the run.
    """

    def excess(changes: list[Change]) -> int:
        shortages = plan(with_changes(run, stage, changes=changes)).shortages(limits)
        return sum(shortage.needed - shortage.available for shortage in shortages)

    chosen: list[Change] = []
    remaining = excess([])
    for change in _candidates(run, stage, ranks=ranks, is_cuda=limits.device is not None):
        left = excess([*chosen, change])
        if left < remaining:
            chosen, remaining = [*chosen, change], left
        if remaining == 0:
            break
    for change in chosen[:-1]:  # cheaper ones, which later ones may have made needless
        fewer = [other for other in chosen if other is not change]
        chosen = fewer if excess(fewer) == remaining else chosen
    return [] if remaining else chosen


def with_changes(run: RunConfig, stage: str, *, changes: list[Change]) -> RunConfig:
    """The run with the settings of all changes; ZeRO stages are only raised."""
    for change in changes:
        config = run.training_config(stage)
        group = next(iter(change.settings)).rpartition(".")[0]  # the settings of a change are of one group
        values: dict[str, Any] = {name.rpartition(".")[2]: value for name, value in change.settings.items()}
        if group == "engine":
            engines = engines_of(run, stage).items()
            zero = values.pop("zero_stage", 0)
            values = {name: replace(own, **values, zero_stage=max(own.zero_stage, zero)) for name, own in engines}
        if group == "lora":
            values = {"lora": replace(config.lora, **values)}
        own = run.checkpoint if group == "checkpoint" else config
        changed: dict[str, Any] = {group if group == "checkpoint" else stage: replace(own, **values)}
        run = replace(run, **changed)
    return run


def _candidates(run: RunConfig, stage: str, *, ranks: int, is_cuda: bool) -> Iterator[Change]:
    """Everything to try, the cheapest first."""
    config = run.training_config(stage)
    engine = config.engine
    if ranks > 1 and engine.zero_stage < 2:
        yield Change("no slower", {_ZERO: 2})
    if run.ppo is config and run.ppo.reuse_frozen_layers:
        yield Change("frozen layers are computed in every pass", {"reuse_frozen_layers": False})
    # Half the micro-batch, half of that, and so on: the same results, less to compute at once.
    sizes = {name: getattr(config, name) for name in config.micro_batch_settings}
    while any(size % 2 == 0 for size in sizes.values()):
        sizes = {name: size // 2 if size % 2 == 0 else size for name, size in sizes.items()}
        yield Change("smaller batches are slower on a GPU", sizes)
    if not engine.activation_checkpointing:
        yield Change("about a third more compute", {"engine.activation_checkpointing": True})
    if ranks > 1 and engine.zero_stage < 3:
        yield Change("half as much communication again", {_ZERO: 3})
    yield from _for_states(run, stage, is_cuda=is_cuda)
    if config.lora.rank == 0:
        yield Change("adapters learn less than the whole model", {"lora.rank": _LORA_RANK})


def _for_states(run: RunConfig, stage: str, *, is_cuda: bool) -> Iterator[Change]:
    """Other places and fewer bytes for weights and optimizer state."""
    engine, on_cpu, on_disk = run.training_config(stage).engine, OffloadDevice.cpu, OffloadDevice.nvme
    optimizer, weights = "engine.offload_optimizer", "engine.offload_param"
    sharded, disk = {_ZERO: max(1, engine.zero_stage)}, {"engine.nvme_path": engine.nvme_path or "FOLDER"}
    without = Change("training waits for checkpoints", {"checkpoint.asynchronous": False})
    no_copy = [without] if run.checkpoint.asynchronous else []
    yield from no_copy
    narrow = list(_narrow_state(engine)) if all(map(_may_narrow, engines_of(run, stage).values())) else []
    yield from narrow[:1]
    if is_cuda:
        yield Change("the step runs on the CPU", sharded | {optimizer: on_cpu})
        yield Change("weights travel to every use", {_ZERO: 3, weights: on_cpu})
    yield from no_copy  # again: the host may have had room for it until the states came
    yield from narrow[1:]
    yield Change("the step reads and writes a disk", sharded | {optimizer: on_disk} | disk)
    yield Change("every use of weights reads a disk", {_ZERO: 3, weights: on_disk} | disk)


def _may_narrow(engine: EngineConfig) -> bool:
    return engine.precision in (Precision.bf16, Precision.auto)


def _narrow_state(engine: EngineConfig) -> Iterator[Change]:
    """Fewer bytes of optimizer state, the least harm first; the first leaves results alone."""
    yield Change("masters are put together for each step", {"engine.master_weights": MasterWeights.split})
    yield Change("gradients are rounded to bf16", {"engine.grad_accum_dtype": GradDtype.bf16})
    if engine.moments == MomentDtype.fp32:
        yield Change("moments are rounded to bf16", {"engine.moments": MomentDtype.bf16})
    if engine.moments != MomentDtype.int8:
        yield Change("moments have 8 bits", {"engine.moments": MomentDtype.int8})
