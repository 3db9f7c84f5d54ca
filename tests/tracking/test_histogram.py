"""Counts of magnitudes, against numpy on the same edges."""

import numpy as np
import pytest
import torch

from rlhf.tracking.histogram import BINS, count, histogram


def test_counts_are_those_of_numpy_between_the_same_edges():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 1, 10_000)
    found = histogram(count(values))
    expected, _ = np.histogram(values.numpy(), bins=found.edges)
    assert found.counts == expected.tolist()
    assert sum(found.counts) == 10_000
    assert found.edges == sorted(found.edges)
    assert found.counts[0] > 0
    assert found.counts[-1] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_powers_of_two_stand_at_the_lower_edge_of_their_bin(dtype):
    found = histogram(count(torch.tensor([1.0, 1.5, 2.0, -1.0], dtype=dtype)))
    bins = {(low, high): n for low, high, n in zip(found.edges, found.edges[1:], found.counts, strict=False) if n}
    assert bins == {(1.0, 2.0): 2, (2.0, 4.0): 1, (-2.0, -1.0): 1}


def test_what_is_tiny_is_zero_what_is_huge_is_the_largest_and_what_is_no_number_is_not_counted():
    found = histogram(count(torch.tensor([0.0, 1e-30, -1e-30, 1e30, torch.inf, torch.nan])))
    assert (sum(found.counts), found.counts[0], found.counts[-1]) == (4, 3, 1)
    assert found.edges[0] < 0 < found.edges[1]


def test_counts_of_ranks_add_up_and_nothing_is_one_empty_bin():
    values = torch.linspace(-3, 3, 101)
    assert torch.equal(count(values), count(values[:40]) + count(values[40:]))
    assert histogram(torch.zeros(BINS, dtype=torch.int64)).counts == [0]
