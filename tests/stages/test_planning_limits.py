"""Free memory as the kernel tells it: the machine's, and what control groups of either version leave of it."""

import pytest

from rlhf.tracking.memory import resident
from stages.planning_limits import free_host

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


def own():
    return resident()["RssAnon"]


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
    assert machine(tmp_path, groups, files) == pytest.approx(expected + own(), abs=50_000_000)


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
    assert machine(tmp_path, groups, files) == pytest.approx(1.5 * GB + own(), abs=50_000_000)
