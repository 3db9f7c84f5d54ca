"""The machine with the GPU: what it is, what its tests say, and how fast it copies."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import zero_disk
from benchmarks.gpu_bench import ROOT, Bench, failures, seconds
from benchmarks.recipes import hardware
from benchmarks.zero_report import table
from rlhf.engine.offload.transfers import BufferPool
from rlhf.memory_plan.limits import free_host

_PACKAGES = ("transformers", "peft", "accelerate", "datasets", "numpy", "pytest")


def versions(bench: Bench) -> str:
    """What is installed, and on what."""
    facts = bench.call(machine_facts, device=bench.device, folder=str(bench.folder))
    return table(["", ""], [[name, str(value)] for name, value in facts.items()])


def machine_facts(device: str, folder: str) -> dict[str, str]:
    """Card, versions and sizes, in words."""
    facts = {"commit": _said("git", "rev-parse", "HEAD"), "processor": hardware()}
    facts["memory, disk"] = f"{free_host() / 1e9:.0f} GB free, {shutil.disk_usage(folder).free / 1e9:.0f} GB free"
    facts |= {name: _version(name) for name in _PACKAGES}
    facts["system"] = platform.platform()
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        query = ("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,pcie.link.gen.max", "--format=csv,noheader")
        facts["card"] = f"{torch.cuda.device_count()} x {card.name}, {card.multi_processor_count} multiprocessors"
        facts["capability, memory"] = f"{card.major}.{card.minor}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        facts["CUDA, cuDNN"] = f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["driver, clock, PCIe"] = _said(*query)
    return facts


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _said(*command: str) -> str:
    """What a command of the system says, where it has it."""
    if shutil.which(command[0]) is None:
        return f"no {command[0]} here"
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def tests(bench: Bench) -> str:
    """Every test that needs a GPU, those of whole runs beside the others; on a CPU some are collected and skipped."""
    marked = [file for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text()]
    files = sorted(str(file.relative_to(ROOT)) for file in marked)
    groups = {"parts": [file for file in files if "/stages/" not in file][: 2 if bench.toy else None]}
    if not bench.toy:
        groups["whole runs"] = [file for file in files if "/stages/" in file]
    tried = bench.together({name: partial(_pytest, bench, group) for name, group in groups.items()})
    return "\n\n".join(f"{name}: {one.value}" for name, one in tried.items() if one.value) + failures(tried)


def _pytest(bench: Bench, files: list[str]) -> str:
    # A test that hangs is found by where its threads are; plugins for that may not be there.
    options = "-m gpu -q --tb=short --durations=5 -p no:cacheprovider -o faulthandler_timeout=60"
    command = [sys.executable, "-m", "pytest", *options.split(), *files]
    output = bench.run(command, allowed=(0, 1)).strip()  # 1: tests have failed
    return f"**{output.splitlines()[-1].strip('= ')}**\n\n```\n{output[-8000:]}\n```"


def copies(bench: Bench) -> str:
    """Copies within the device and between it and the host, products of matrices, and the NVMe disk."""
    sizes = {"megabytes": 8, "width": 256} if bench.toy else {"megabytes": 1024, "width": 8192}
    rates = bench.call(copy_rates, device=bench.device, **sizes)
    head = table(["", "rate"], [[name, value] for name, value in rates.items()])
    sizes = {"nbytes": 8 << 20, "tile": 1 << 20} if bench.toy else {"nbytes": 1 << 30, "tile": 32 << 20}
    disk = bench.call(disk_rates, folder=str(bench.folder), rounds=1 if bench.toy else 2, **sizes)
    return f"{head}\n\nDisk of `--folder`: {disk}"


def disk_rates(folder: str, nbytes: int, tile: int, rounds: int) -> str:
    """A table of reading and writing as offloading to NVMe does it, beside bare system calls."""
    return zero_disk.compare(Path(folder), nbytes=nbytes, tile=tile, buffers=4, rounds=rounds)


def copy_rates(device: str, megabytes: int, width: int) -> dict[str, str]:
    """GB/s of copies by kind, and TFLOP/s of a bf16 product; a copy within the device counts what it reads and writes.

    Args:
        device: cuda, or cpu, where the host's memory is the device's.
        megabytes: of each copy.
        width: of the square matrices.
    """
    nbytes = megabytes << 20
    rates = {"within the device, read and written": f"{device_rate(device, nbytes=nbytes) / 1e9:.0f} GB/s"}
    if device == "cuda":
        locked = BufferPool(2, nbytes=nbytes, pin=True)
        copies = _copies(*(locked.take()[:nbytes].fill_(1) for _ in range(2)))
        rates |= {name: f"{nbytes / seconds(copy, device=device) / 1e9:.1f} GB/s" for name, copy in copies.items()}
        locked.close()
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * width**3 / seconds(lambda: a @ b, device=device)
    return rates | {f"bf16 product of {width} x {width}": f"{product / 1e12:.3g} TFLOP/s"}


def device_rate(device: str, *, nbytes: int) -> float:
    """Bytes a second that a copy within the device reads and writes."""
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / seconds(lambda: target.copy_(source), device=device, rounds=10)


def _copies(locked: Tensor, other: Tensor) -> dict[str, Callable[[], Any]]:
    """Copies between the device and the host's ordinary memory, or the page-locked memory that is given."""
    ordinary = torch.ones_like(locked)
    here, there = (torch.ones_like(locked, device="cuda") for _ in range(2))
    inwards, outwards = torch.cuda.Stream(), torch.cuda.Stream()

    def both() -> None:
        user = torch.cuda.current_stream()
        for stream, into, from_ in ((inwards, here, locked), (outwards, other, there)):
            stream.wait_stream(user)
            with torch.cuda.stream(stream):
                into.copy_(from_, non_blocking=True)
        user.wait_stream(inwards)  # only now: the copies would follow each other
        user.wait_stream(outwards)

    return {
        "page-locked to device": lambda: here.copy_(locked, non_blocking=True),
        "device to page-locked": lambda: locked.copy_(here, non_blocking=True),
        "both at once, each way": both,
        "pageable to device": lambda: here.copy_(ordinary),
        "device to pageable": lambda: ordinary.copy_(here),
    }
