"""Working weights that the host writes, in more pieces than there are buffers."""

import pytest
import torch
from torch import nn

from rlhf.engine.offload.sharded_weights import StagedWeights

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_staged_weights_arrive_rounded_where_they_belong(monkeypatch, dtype):
    monkeypatch.setattr("rlhf.engine.offload.sharded_weights._STAGED", 64)
    parameter = nn.Parameter(torch.zeros(30, 40, dtype=dtype))
    weights = StagedWeights([{"w": parameter}], CPU, pin=False)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    weights.write("w", 128, values=values)
    values_before = values.clone()
    values.fill_(torch.nan)
    weights.flush()
    flat = parameter.detach().flatten()
    assert torch.equal(flat[128:1128], values_before.to(dtype))
    assert not flat[:128].any()
    assert not flat[1128:].any()
    assert torch.equal(weights.read("w", 128, count=1000), values_before.to(dtype).float())
    weights.close()
