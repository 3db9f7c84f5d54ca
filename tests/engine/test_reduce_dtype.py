"""Gradients that are sent to other ranks in bf16, against sums worked out with plain tensors."""

import pytest
import torch

from tests.engine import scenarios, tiny

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = {"fp32": 1, "bf16": 1, "fp16": 1024}  # of the loss
MAY_DIFFER = {"fp32": 2**-7, "bf16": 1e-6, "fp16": 2**-7}
"""Of the largest gradient. Where a gradient is rounded on its way, one that differs in its last bit may round apart."""


@pytest.fixture(scope="module")
def pieces():
    """What each rank's micro-batches leave, by precision and number of them: `[rank][micro-batch][name]`."""
    found = {}
    for precision, dtype in TYPES.items():
        model = tiny.reference()
        buffers = [buffer.clone() for buffer in model.buffers()]
        model.to(dtype)
        for buffer, real in zip(model.buffers(), buffers, strict=True):
            buffer.data = real
        ids, counts = tiny.batch(0)
        for accumulation in (1, 2):
            parts = []
            for rows, counted in zip(ids.chunk(2 * accumulation), counts.chunk(2 * accumulation), strict=True):
                (SCALE[precision] * tiny.token_loss(model(rows), rows, counted, counts.sum())).backward()
                parts.append({name: parameter.grad for name, parameter in model.named_parameters()})
                model.zero_grad()
            found[precision, accumulation] = parts[:accumulation], parts[accumulation:]
    return found


def worked(first, second, *, is_sharded, stage):
    """The sum of one parameter's gradients, `first` and `second` of a rank each, sent in bf16."""
    if not is_sharded:  # micro-batches are added in fp32, ranks in bf16
        ranks = [torch.stack([piece.float() for piece in mine]).sum(0).bfloat16() for mine in (first, second)]
        return (ranks[0] + ranks[1]).float()
    if stage == 1:  # FSDP2 adds micro-batches in bf16
        ranks = [sum(piece.bfloat16() for piece in mine) for mine in (first, second)]
        return (ranks[0] + ranks[1]).float()
    # Each micro-batch is reduced in bf16, and added in fp32.
    return sum((one.bfloat16() + other.bfloat16()).float() for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", scenarios.REDUCTIONS)
@pytest.mark.parametrize("precision", TYPES)
def test_what_two_ranks_send_in_bf16_adds_up_as_worked_out(on_ranks, pieces, precision, name, accumulation):
    stage, settings = scenarios.REDUCTIONS[name]
    for rank in on_ranks(2):
        found = rank["reductions"][precision, name, accumulation, "bf16"]
        exact = rank["reductions"][precision, name, accumulation, "fp32"]
        first, second = pieces[precision, accumulation]
        assert found.keys() == first[0].keys()
        for key, gradient in found.items():
            is_sharded = stage > 0 and gradient.numel() >= settings.get("persistence_threshold", 0)
            parts = ([micro[key] for micro in mine] for mine in (first, second))
            expected = worked(*parts, is_sharded=is_sharded, stage=stage) / SCALE[precision]
            largest = expected.abs().max().item()
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=MAY_DIFFER[precision] * largest, msg=key)
            assert (gradient - exact[key]).abs().max() <= 2**-7 * accumulation * largest, key
            assert not torch.equal(gradient, exact[key]), key


@pytest.mark.parametrize("name", scenarios.REDUCTIONS)
def test_fp32_is_the_plain_sum(on_ranks, pieces, name):
    for rank in on_ranks(2):
        for precision in TYPES:
            found = rank["reductions"][precision, name, 2, "fp32"]
            for key, gradient in found.items():
                parts = [micro[key].float() for mine in pieces[precision, 2] for micro in mine]
                expected = torch.stack(parts).sum(0) / SCALE[precision]
                close = 1e-6 * expected.abs().max().item()
                torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=close, msg=key)
