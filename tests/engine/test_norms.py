"""The squared norm against fp64, and wherever the rows are cut."""

import pytest
import torch

from rlhf.engine.norms import BLOCK, squared_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, 300 * BLOCK + 17])
def test_it_is_the_sum_of_squares(dtype, count):
    rows = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert squared_norm(rows).item() == pytest.approx(rows.double().square().sum().item(), rel=1e-6)


def test_cuts_at_blocks_change_nothing_that_fp32_can_see():
    rows = torch.randn(200 * BLOCK + 5, generator=torch.Generator().manual_seed(2))
    whole = squared_norm(rows).sqrt().float()
    for blocks in (1, 3, 64):
        parts = sum(squared_norm(part) for part in rows.split(blocks * BLOCK))
        assert parts.sqrt().float() == whole


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_shows(value):
    rows = torch.zeros(3 * BLOCK)
    rows[BLOCK + 3] = value
    assert not squared_norm(rows).isfinite()
