"""Reading and writing through `DirectFile` and `BufferPool` against bare system calls on the same file system.

Bare: one thread, `O_DIRECT`, 8 MiB at a time, one buffer on huge pages. Left out: the medium behind the file system; a
virtual disk with a host's cache says nothing about an NVMe.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from benchmarks.zero_report import spread, table
from rlhf.engine.offload.direct_io import DirectFile
from rlhf.engine.offload.transfers import BufferPool

_REQUEST = 8 << 20


def compare(folder: Path, *, nbytes: int, tile: int, buffers: int, rounds: int) -> str:
    """A table of GB/s, alternating; the first round is dropped.

    Args:
        folder: on the file system to measure.
        nbytes: size of each file.
        tile: bytes of one of our buffers.
        buffers: how many of them.
        rounds: that count.
    """
    nbytes -= nbytes % tile
    contenders = {"bare": bare(folder / "bare", nbytes=nbytes), "ours": ours(folder, nbytes, tile, buffers)}
    rates: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for name, (write, read) in contenders.items():
            for direction, action in (("write", write), ("read", read)):
                start = time.perf_counter()
                action()
                if number > 0:
                    rates.setdefault((direction, name), []).append(nbytes / (time.perf_counter() - start) / 1e9)
    rows = []
    for direction in ("write", "read"):
        raw, own = rates[direction, "bare"], rates[direction, "ours"]
        shares = [o / r for o, r in zip(own, raw, strict=True)]
        rows.append([direction, spread(raw), spread(own), spread(shares)])
    what = f"{nbytes / 1e9:.1f} GB through {buffers} buffers of {tile / 1e6:.0f} MB, {rounds} alternating rounds."
    return f"{what}\n\n" + table(["", "bare, GB/s", "ours, GB/s", "ours / bare (aim 0.80)"], rows)


Transfers = tuple[Callable[[], None], Callable[[], None]]


def bare(path: Path, *, nbytes: int) -> Transfers:
    """System calls one after the other."""
    keep = BufferPool(1, nbytes=_REQUEST)
    view = memoryview(keep.take().fill_(1).numpy())
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    path.unlink()
    os.posix_fallocate(file, 0, nbytes)

    def every(call: Callable[[int, list[memoryview], int], int]) -> None:
        for offset in range(0, nbytes, _REQUEST):
            length = min(_REQUEST, nbytes - offset)
            assert call(file, [view[:length]], offset) == length

    return lambda: every(os.pwritev), lambda: every(os.preadv)


def ours(folder: Path, nbytes: int, tile: int, count: int) -> Transfers:
    """Tile after tile, as the optimizer travels: written behind, read ahead."""
    buffers = BufferPool(count, nbytes=tile)
    file = DirectFile(folder, nbytes=nbytes, pool=buffers, label="benchmark")

    def write() -> None:
        for offset in range(0, nbytes, tile):
            buffer = buffers.take()
            file.write(offset, buffer)
            buffers.give_back(buffer)
        file.flush()

    def read() -> None:
        ahead = deque()
        for offset in range(0, nbytes, tile):
            buffer = buffers.take()
            ahead.append((buffer, file.read(offset, buffer)))
            if len(ahead) == count:
                use(ahead)
        while ahead:
            use(ahead)

    def use(ahead: deque) -> None:
        buffer, pending = ahead.popleft()
        pending.wait()
        buffers.give_back(buffer)

    return write, read
