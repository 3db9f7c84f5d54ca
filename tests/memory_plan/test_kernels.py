"""Memory of compiled kernels: what a process has after it has met many shapes."""

import subprocess
import sys

import pytest
import torch

from rlhf.memory_plan.kernels import compiled_kernels
from rlhf.runtime.process import KERNEL_CACHES, heap_in_use

MEETS_SHAPES = """
import torch
from rlhf.memory_plan.kernels import compiled_kernels
from rlhf.runtime.process import heap_in_use
planned, before = compiled_kernels(torch.bfloat16), heap_in_use()
matrix = torch.ones(320, 192, dtype=torch.bfloat16)
for rows in range(100, 300):  # many more than are kept
    torch.nn.functional.linear(torch.ones(rows, 192, dtype=torch.bfloat16), matrix)
print(planned, heap_in_use() - before)
"""


@pytest.mark.skipif(not heap_in_use(), reason="this C library does not say what is in use")
def test_caches_that_are_full_hold_what_was_planned(monkeypatch):
    for name in KERNEL_CACHES:
        monkeypatch.setenv(name, "40")  # read when the library starts
    found = subprocess.run([sys.executable, "-c", MEETS_SHAPES], check=True, capture_output=True, text=True).stdout
    planned, grown = map(int, found.split())
    if planned < 1 << 20:  # what is in use also changes by itself, by some kilobytes
        pytest.skip("nothing is compiled for bf16 here")
    # Other shapes, whose kernels are of about the same size; those that were measured are in the cache before.
    assert grown == pytest.approx(planned, rel=0.5)


def test_products_that_no_library_compiles_for_take_nothing():
    assert compiled_kernels(torch.float64) < 1_000_000
