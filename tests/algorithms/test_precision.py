import pytest
import torch

from rlhf.algorithms.masked import at_least_fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float32])
def test_everything_below_fp64_becomes_fp32(dtype):
    assert at_least_fp32(torch.ones(2, dtype=dtype)).dtype == torch.float32


def test_fp64_stays_fp64():
    assert at_least_fp32(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


def test_fp32_is_not_copied():
    x = torch.ones(2)
    assert at_least_fp32(x) is x
