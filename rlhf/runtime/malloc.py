"""How the C library treats memory that is freed: given back where that costs little, so that a plan can be kept.

Left out: page-locked buffers and those of a tier (`engine/tiers/buffers.py`).
"""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGE = 4 << 20  # bytes
_SMALLER = 1 << 20  # bytes: for tiers on disk, which are there to save memory
_OF_THE_USER = "MALLOC_MMAP_THRESHOLD_"  # glibc's own variable, in bytes
_KEPT = 16 << 20  # bytes at the end of the heap

_asked: set[bool] = set()  # whether tight: a process has one heap, whoever asks


def return_freed_memory(*, tight: bool = False) -> None:
    """Have tensors of 4 MiB and more given back to the system when they are freed.

    glibc learns from the first ones that are freed to keep blocks of up to 32 MiB for later, in a heap that then fills
    with holes: what is gathered and reduced came on top of what had been. Memory of the system costs page faults
    instead, which are few beside what is computed with so large a tensor; with tensors of 1 MiB they took a third of a
    step. For the whole process and for good; other C libraries are left as they are, and so is glibc where
    MALLOC_MMAP_THRESHOLD_ is in the environment.

    To be called before a model is made: where the heap has a hole that is large enough, it is taken, whatever was
    asked for here, and modules that are made only to be moved to meta leave one of the model's size.

    Args:
        tight: from 1 MiB on.
    """
    library = _glibc()
    if library is None or _OF_THE_USER in os.environ:
        return
    _asked.add(tight)
    library.mallopt(_M_MMAP_THRESHOLD, _SMALLER if True in _asked else _LARGE)
    library.mallopt(_M_TRIM_THRESHOLD, _SMALLER if True in _asked else _KEPT)
    library.malloc_trim(0)


def trim() -> None:
    """Give back the whole pages that are free now, once: for the end of something large that does not come again.

    What was read to fill a model would otherwise stay resident, between what is kept, as long as the process. Takes
    some milliseconds.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
