"""Makes the C library return freed memory to the system where that costs little, so that a memory plan holds.

See also: page-locked and offload buffers, which do not come from the heap (`engine/offload/transfers.py`).
"""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGE = 4 << 20  # bytes
_SMALLER = 1 << 20  # bytes: with offloading to disk, which is there to save memory
_OF_THE_USER = "MALLOC_MMAP_THRESHOLD_"  # glibc's own variable, in bytes
_KEPT = 16 << 20  # bytes at the end of the heap that stay

_asked: set[bool] = set()  # values of `tight` so far: a process has one heap, so the tightest wins


def return_freed_memory(*, tight: bool = False) -> None:
    """Return tensors of 4 MiB and more to the system when they are freed.

    By default glibc learns from the first frees to keep blocks of up to 32 MiB for later, in a heap that fills with
    holes, so that gathered and reduced tensors add to the peak. Fresh memory costs page faults instead, which are few
    compared with the computation on so large a tensor; with tensors of 1 MiB they took a third of a step. The setting
    is for the whole process and permanent. Other C libraries are not changed, nor is glibc if MALLOC_MMAP_THRESHOLD_
    is in the environment.

    Call it before a model is made: a large enough hole in the heap is used whatever is set here, and modules that are
    made only to be moved to meta leave one of the model's size.

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
    """Return all pages that are free now, once; call it after something large that does not come again.

    Otherwise the memory used for reading a model would stay resident for the life of the process, between blocks that
    are still used. Takes some milliseconds.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
