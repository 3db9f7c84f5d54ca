"""What is resident after tensors were freed, in a process of its own: the heap of this one has a past."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from rlhf.runtime.process import heap_in_use

CODE = """
import torch
from rlhf.runtime.process import return_freed_memory, trim
from rlhf.tracking.timing import resident

{call}
for _ in range(3):  # glibc learns from what is freed
    torch.ones({count})
kept, before = [], resident()["RssAnon"]
freed = [torch.ones({count}) for _ in range({pieces})]
for tensor in freed:  # something small lies between them
    kept.append(torch.ones(1000))
for index, tensor in enumerate(freed):
    kept.append(torch.ones(1000))
kept += freed[1::2]
held = sum(tensor.nbytes for tensor in kept)
del freed, tensor
{last}
print(resident()["RssAnon"] - before - held)
"""
MB = 1_000_000


def left_over(*, call="", last="", count, pieces, **environment):
    code = CODE.format(call=call, last=last, count=count, pieces=pieces)
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return int(found.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_every_second_of_large_tensors_that_is_freed_goes_back():
    """20 of 40 tensors of 8 MB."""
    sizes = {"count": 2 * MB, "pieces": 40}
    assert left_over(**sizes) > 100 * MB
    assert left_over(call="return_freed_memory()", **sizes) < 10 * MB
    assert left_over(call="return_freed_memory()", MALLOC_MMAP_THRESHOLD_=str(32 << 20), **sizes) > 100 * MB
    both = "return_freed_memory(tight=True); return_freed_memory()"
    assert left_over(call=both, count=500_000, pieces=160) < 10 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_small_ones_go_back_when_asked():
    """80 of 160 tensors of 2 MB."""
    sizes = {"count": 500_000, "pieces": 160}
    assert left_over(call="return_freed_memory()", **sizes) > 100 * MB
    assert left_over(call="return_freed_memory()", last="trim()", **sizes) < 10 * MB


def test_what_is_in_use_of_the_heap_rises_and_falls_with_tensors():
    before = heap_in_use()
    if not before:
        pytest.skip("this C library does not say")
    tensor = torch.ones(3 << 20, dtype=torch.uint8)
    assert heap_in_use() - before == pytest.approx(3 << 20, rel=0.05)
    del tensor
    assert heap_in_use() - before < 1 << 16


CRASH = """
import os, run_pipeline, signal
def crash(words): os.kill(os.getpid(), signal.SIGSEGV)
run_pipeline.start_or_work = crash
run_pipeline.main()
"""


@pytest.mark.parametrize("closed", ["", "2>&-"])
def test_a_crash_says_where_each_thread_was(closed, tmp_path):
    line = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", CRASH]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == -signal.SIGSEGV
    if not closed:
        assert "Fatal Python error: Segmentation fault" in done.stderr
        assert "in crash" in done.stderr
