"""One rank of `long_run.py`: PPO that notes what its process holds, every few iterations.

    python -m benchmarks.long_run_rank CONFIG FOLDER EVERY

Left out: judging it.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.lifecycle.session import Session
from stages.pipeline import run_stages, start_rank
from stages.setup.compose import load_run

Reading = dict[str, float]


def main() -> None:
    """Run the stage; readings go to `FOLDER/rank<N>.jsonl`."""
    config, folder, every = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    run = load_run(config)
    world = start_rank(run)
    watch(folder / f"rank{world.rank}.jsonl", every=every, device=world.device)
    run_stages(run, run.stages, world=world)


def watch(file: Path, *, every: int, device: torch.device) -> None:
    """From now on, append what the process holds half-way between multiples of `every` steps."""
    finish_step = Session.finish_step

    def watched(session: Session, step: int, *arguments: Any, **words: Any) -> None:
        finish_step(session, step, *arguments, **words)
        # Half-way: a checkpoint that was begun at a multiple has been written, with its thread and its files.
        if step % every == every // 2:
            with file.open("a") as lines:
                lines.write(json.dumps({"step": step} | reading(device)) + "\n")

    Session.finish_step = watched  # type: ignore[method-assign]


def reading(device: torch.device) -> Reading:
    """What this process holds: MB of memory, and counts."""
    gc.collect()  # what only waits for the collector is not held
    kinds = [type(held) for held in gc.get_objects()]  # asking the objects themselves could run their code
    found = {
        "own memory, MB": _kilobytes("RssAnon") / 1e3,
        "shared memory, MB": _kilobytes("RssShmem") / 1e3,
        "open files": float(_entries("fd") - 1),  # one is the listing's own
        "threads": float(_entries("task")),
        "objects": float(len(kinds)),
        "tensors": float(sum(issubclass(kind, Tensor) for kind in kinds)),
    }
    return found | (_cuda_reading(device) if device.type == "cuda" else {})


def _cuda_reading(device: torch.device) -> Reading:
    """What CUDA's allocator holds beyond tensors, and in how many pieces."""
    stats = torch.cuda.memory_stats(device)
    unused = stats["reserved_bytes.all.current"] - stats["allocated_bytes.all.current"]
    return {
        "CUDA: reserved and unused, MB": unused / 1e6,
        "CUDA: segments": float(stats["segment.all.current"]),
        "CUDA: unused split blocks": float(stats["inactive_split.all.current"]),
    }


def _entries(folder: str) -> int:
    return sum(1 for _ in Path(f"/proc/self/{folder}").iterdir())


def _kilobytes(entry: str) -> int:
    found = re.search(rf"^{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {entry}"
    return int(found[1])


if __name__ == "__main__":
    main()
