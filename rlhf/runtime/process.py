"""What a run asks of its process: to end with its parent, how libraries behave, and to return freed memory.

Imports only the standard library, because `run_pipeline.py` calls this before it imports anything large.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import signal
import sys
import threading
import time

LAUNCHER = "RLHF_LAUNCHER"
"""Environment variable with the process id of the launcher, in the ranks that it started."""
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""How many compiled kernels oneDNN keeps, and how many PyTorch's layer above it: a half of each kernel's bytes."""
VARIABLES = {
    "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait stall a machine that is shared
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    **dict.fromkeys(KERNEL_CACHES, "128"),  # a CPU's, one for each shape it meets; 1,024 would be some 0.6 GB
}
"""Environment variables of a run, which libraries read when they are imported; a user's own come first."""

_LIBC = ctypes.CDLL(None)  # opened here, because loading it between fork and exec could deadlock
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_MIB = 1 << 20
_SECONDS_BETWEEN_POLLS = 1.0

_tight_calls: set[bool] = set()  # values of `tight` so far: a process has one heap, so the tightest wins


# ---- the parent: without this, a killed run would leave ranks behind that write next to those of the next run


def end_with_launcher() -> None:
    """In a rank, end when the launcher does, ours or torchrun; in other processes, do nothing.

    Other launchers are not followed: some start ranks from a thread that ends, which Linux counts as the parent's end.
    """
    if LAUNCHER in os.environ:
        end_with_parent(int(os.environ[LAUNCHER]))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


def end_with_parent(parent: int) -> None:
    """Make this process end when `parent`, the process that started it, does; at once if it already has.

    On Linux the kernel kills it, whatever it is doing, also while it imports and after an `exec`. Elsewhere a thread
    polls.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_poll, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before the request, which then comes too late
        os._exit(1)


def _poll(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_POLLS)
    os._exit(1)


# ---- freed memory: a memory plan holds only if it is returned


def return_freed_memory(*, tight: bool = False) -> None:
    """Return tensors of 4 MiB and more to the system when they are freed; of 1 MiB and more if `tight`.

    By default glibc learns from the first frees to keep blocks of up to 32 MiB for later, in a heap that fills with
    holes, so that gathered and reduced tensors add to the peak. Fresh memory costs page faults instead, which are few
    compared with the computation on so large a tensor; with tensors of 1 MiB they took a third of a step, so `tight` is
    for offloading to disk, which is there to save memory. The setting is for the whole process and permanent. Other C
    libraries are not changed, nor is glibc if its own MALLOC_MMAP_THRESHOLD_ is in the environment.

    Call it before a model is made: a large enough hole in the heap is used whatever is set here, and modules that are
    made only to be moved to meta leave one of the model's size.

    See also: buffers that do not come from the heap (`engine/offload/transfers.py`).
    """
    if not _is_glibc() or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    _tight_calls.add(tight)
    is_tight = True in _tight_calls
    _LIBC.mallopt(_M_MMAP_THRESHOLD, _MIB if is_tight else 4 * _MIB)
    _LIBC.mallopt(_M_TRIM_THRESHOLD, _MIB if is_tight else 16 * _MIB)  # what stays at the end of the heap
    _LIBC.malloc_trim(0)


def trim() -> None:
    """Return all pages that are free now, once; call it after something large that does not come again.

    Otherwise the memory used for reading a model would stay resident for the life of the process, between blocks that
    are still used. Takes some milliseconds.
    """
    if _is_glibc():
        _LIBC.malloc_trim(0)


def free_models() -> None:
    """Free models that nobody uses any more: they hold themselves by reference cycles until Python looks for those."""
    gc.collect()
    trim()


def heap_in_use() -> int:
    """Bytes that this process has of the heap and has not freed; 0 where the C library does not say (glibc 2.33)."""
    if not hasattr(_LIBC, "mallinfo2"):
        return 0
    _LIBC.mallinfo2.restype = _MallInfo
    info = _LIBC.mallinfo2()
    return int(info.uordblks + info.hblkhd)  # in the heap, and mapped one by one


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of <malloc.h>."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
