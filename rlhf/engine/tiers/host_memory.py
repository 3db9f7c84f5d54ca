"""How the C library treats memory that is freed, for models that do not fit into it.

Left out: page-locked buffers (`buffers.py`).
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_LARGE = 1 << 20  # bytes


def return_freed_memory() -> None:
    """Give tensors of 1 MiB and more back to the system when they are freed.

    glibc learns from the first ones that are freed to keep blocks of up to 32 MiB for later, in a heap that then fills
    with holes: three times as much was resident as was in use, and more the larger the model. Costs page faults
    instead. For the whole process; other C libraries are left as they are.
    """
    library = _glibc()
    if library is None:
        return
    library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    library.mallopt(_M_TRIM_THRESHOLD, _LARGE)
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
