"""Free memory as the kernel tells it: the machine's, and what control groups of either version leave of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.config.run_config import MemoryConfig
from rlhf.memory_plan import limits as limits_module
from rlhf.memory_plan import plan_text as report_module
from rlhf.memory_plan.limits import free_host, full_disks
from rlhf.memory_plan.plan import Item, Limits, Phase, Place, Plan
from rlhf.tracking.timing import resident
from tests.config.test_configuration import composed

GB = 1_000_000_000
UNLIMITED = 9_223_372_036_854_771_712  # what version 1 shows


def machine(root, groups, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {20 * GB // 1024} kB\n")
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in groups))
    for path, text in files.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return free_host(root)


V1 = ["4:memory:/job", "1:cpu:/job", "0::/"]
V2 = ["0::/job"]


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V1, {"memory/job/memory.limit_in_bytes": 3 * GB, "memory/job/memory.usage_in_bytes": GB}, 2 * GB),
        (V1, {"memory/memory.limit_in_bytes": 3 * GB, "memory/memory.usage_in_bytes": GB}, 2 * GB),
        (V1, {"memory/job/memory.limit_in_bytes": UNLIMITED, "memory/job/memory.usage_in_bytes": GB}, 20 * GB),
        (V2, {"job/memory.max": 5 * GB, "job/memory.current": GB}, 4 * GB),
        (V2, {"job/memory.max": "max", "job/memory.current": GB}, 20 * GB),
        (V2, {"memory.max": 2 * GB, "memory.current": GB, "job/memory.max": 5 * GB, "job/memory.current": GB}, GB),
        ([], {}, 20 * GB),
    ],
)
def test_the_smallest_of_the_machine_and_its_groups(tmp_path, groups, files, expected):
    assert machine(tmp_path, groups, files) == pytest.approx(expected, abs=1024)


@pytest.mark.parametrize(
    ("files", "stat"),
    [
        ({"memory/job/memory.limit_in_bytes": 3 * GB, "memory/job/memory.usage_in_bytes": 3 * GB}, "total_"),
        ({"job/memory.max": 3 * GB, "job/memory.current": 3 * GB}, ""),
    ],
)
def test_pages_of_files_are_free(tmp_path, files, stat):
    place = next(iter(files)).rpartition("/")[0]
    files |= {f"{place}/memory.stat": f"{stat}active_file {GB}\n{stat}inactive_file {GB // 2}\nanon 7"}
    groups = V1 if stat else V2
    assert machine(tmp_path, groups, files) == 1.5 * GB


@pytest.mark.parametrize(("ranks", "rank_of_torchrun", "ours"), [(1, False, 1), (2, False, 0), (2, True, 1)])
def test_a_process_that_only_starts_the_ranks_needs_its_memory_itself(
    tmp_path, monkeypatch, ranks, rank_of_torchrun, ours
):
    monkeypatch.setattr(limits_module, "free_host", lambda: 20 * GB)
    monkeypatch.setattr(report_module, "under_torchrun", lambda: rank_of_torchrun)
    run = SimpleNamespace(
        stages=[],
        output_dir=str(tmp_path),
        memory=MemoryConfig(),
        engine=SimpleNamespace(device="cpu", precision="fp32"),
    )
    _, limits = report_module._here(run, ranks, stages=[])
    assert limits.host == pytest.approx(20 * GB + ours * resident()["RssAnon"], abs=50_000_000)


def test_a_small_disk_is_not_made_up_for_by_a_large_one(tmp_path, monkeypatch):
    small, large = tmp_path / "small", tmp_path / "large"
    run = composed("experiment=smoke", "engine=zero3_nvme", f"engine.nvme_path={small}/x", f"output_dir={large}/y")
    resting = Item("model", "master weights", Place.disk, 3 * GB)
    plan = Plan(
        "sft", ranks=2, is_cuda=False, phases=(Phase("save", (resting, Item("model", "export", Place.disk, GB))),)
    )
    for folder in (small, large):
        folder.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path in (small, large))
    monkeypatch.setattr(limits_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[Path(path)]))
    free = {small: 5 * GB, large: 50 * GB}
    assert full_disks(run, plan) == [
        f"sft: engine.nvme_path={small}/x: found 5.00 GB free, expected 6.00 GB; "
        "free space there, or name a folder on a larger disk."
    ]
    said = report_module.verdict(run, plan, machine=None, limits=Limits(None, 9 * GB, disk=55 * GB))
    assert "does not fit on its disks. sft: engine.nvme_path=" in said
    run.memory.disk_gb = 55.0  # of another machine: nothing here says how it is divided
    assert report_module.verdict(run, plan, machine=None, limits=Limits(None, 9 * GB, disk=55 * GB)).endswith("fits.")
    free[small] = 7 * GB
    assert full_disks(run, plan) == []
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    free[tmp_path] = free[large] = 7 * GB
    (said,) = full_disks(run, plan)  # both on one: 2 x (3 + 1)
    assert "found 7.00 GB free, expected 8.00 GB" in said


def test_each_role_needs_room_where_its_own_engine_writes(tmp_path, monkeypatch):
    small, large = tmp_path / "small", tmp_path / "large"
    for folder in (small, large):
        folder.mkdir()
    paths = [f"engine.nvme_path={large}/x", f"ppo.critic_engine.nvme_path={small}/x", f"output_dir={large}/y"]
    run = composed("experiment=smoke", "engine=zero3_nvme", *paths)
    items = tuple(Item(role, "master weights", Place.disk, 3 * GB) for role in ("actor", "critic"))
    monkeypatch.setattr(Path, "is_mount", lambda path: path in (small, large))
    free = {small: 2 * GB, large: 4 * GB}
    monkeypatch.setattr(limits_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[Path(path)]))
    (sentence,) = full_disks(run, Plan("ppo", ranks=1, is_cuda=False, phases=(Phase("save", items),)))
    assert f"engine.nvme_path={small}/x: found 2.00 GB free, expected 3.00 GB" in sentence
