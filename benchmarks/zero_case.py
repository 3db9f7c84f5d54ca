"""One measured training run in processes of its own: what to run (`Case`), running it, and what came out (`Outcome`).

Left out: the run itself (`zero_run.py`), which other Pythons import too, and which therefore knows nothing of this.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.zero_cap import MemoryCap

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """A random Llama, trained for some steps by one of the contenders."""

    contender: str
    """ours, deepspeed, fsdp2, or plain: one process without an engine."""
    size: str
    ranks: int = 1
    precision: str = "fp32"
    stage: int = 0
    offload_optimizer: str = "none"
    offload_param: str = "none"
    tuned: bool = False
    """DeepSpeed with buffers and buckets cut to the model's size."""
    steps: int = 6
    warmup: int = 2
    """Steps at the start that are not timed, and whose memory counts apart."""
    sequences: int = 2
    """Of each rank in each step."""
    length: int = 128
    accumulation: int = 1
    """Micro-batches that a step's sequences are cut into, for ours."""
    device: str = "cpu"
    """Where ours computes."""
    threads: int = 1
    """Of each rank."""
    peers: int = 1
    """Plain: how many ranks' batches it takes."""
    reduction: str = ""
    """Type in which gradients are sent to other ranks; empty: what the contender does unless it is told."""
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    """More of `EngineConfig`, for ours."""


@dataclass(frozen=True)
class Outcome:
    """What a case cost."""

    cpu_seconds: float
    """Of a step, of all ranks together: the median of the timed steps."""
    wall_seconds: float
    """Of a step: the median."""
    start_peak_mb: float
    """Highest resident memory above the imports before the first timed step; the mean of the ranks."""
    peak_mb: float
    """The same in the timed steps."""
    device_mb: float
    """Most memory of a CUDA device in the timed steps; the mean of the ranks."""
    losses: list[float]
    """Of every step, the mean of the ranks."""

    @classmethod
    def of(cls, reports: list[dict[str, Any]], *, warmup: int) -> Outcome:
        """Join the ranks' reports."""
        cpu, wall, losses = (
            list(zip(*(report[name] for report in reports), strict=True))
            for name in ("cpu_seconds", "wall_seconds", "losses")
        )
        return cls(
            cpu_seconds=statistics.median(map(sum, cpu[warmup:])),
            wall_seconds=statistics.median(map(max, wall[warmup:])),
            start_peak_mb=statistics.mean(report["start_peak"] for report in reports) / 1e6,
            peak_mb=statistics.mean(report["peak"] for report in reports) / 1e6,
            device_mb=statistics.mean(report["device_peak"] for report in reports) / 1e6,
            losses=[statistics.mean(step) for step in losses],
        )


def run(case: Case, *, folder: Path, python: str = sys.executable, cap: MemoryCap | None = None) -> Outcome:
    """Run a case and wait for it.

    Args:
        case: what to run.
        folder: on the disk that offloading to NVMe uses.
        python: an interpreter with the packages of the contender.
        cap: memory that all its processes together may use.

    Raises:
        RuntimeError: a process failed; the end of its output is in the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        command = [python, "-m", "benchmarks.zero_run", json.dumps(asdict(case)), name]
        processes = []
        for rank in range(case.ranks):
            with (place / f"log{rank}").open("w") as log:
                start = [*(cap.command() if cap else []), *command]
                environment = _environment(case, rank, port=port)
                processes.append(subprocess.Popen(start, env=environment, cwd=ROOT, stdout=log, stderr=log))
        failed = _wait(processes)
        if failed is not None:
            log = (place / f"log{failed}").read_text()[-3000:]
            code = processes[failed].returncode
            why = " (killed: the memory limit is too low)" if cap and code == -9 else ""
            raise RuntimeError(f"{case}: rank {failed} ended with {code}{why}:\n{log}")
        reports = [json.loads((place / f"rank{rank}.json").read_text()) for rank in range(case.ranks)]
    return Outcome.of(reports, warmup=case.warmup)


def _environment(case: Case, rank: int, *, port: int) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_SIZE": case.ranks}
    # No thread that spins: the ranks share the machine with each other and with everything else.
    threads = {"OMP_NUM_THREADS": case.threads, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": 0}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": 1}
    return os.environ | {name: str(value) for name, value in (ranks | threads | place).items()}


def _wait(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all; the first rank that fails, or None. The others, which would wait for it, are ended."""
    failed = None
    while failed is None and any(process.poll() is None for process in processes):
        time.sleep(0.1)
        failed = next((rank for rank, process in enumerate(processes) if process.poll()), None)
    for process in processes:
        process.kill()
        process.wait()
    return failed
