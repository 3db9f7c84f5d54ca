"""bf16 weights: fp32 masters, fp32 sums, and the same numbers at every stage."""

import pytest
import torch

from tests.engine import plain, scenarios, tiny


@pytest.fixture(scope="module")
def expected():
    """By number of ranks: a fp32-master reference that sums the same micro-batches' gradients."""
    return {ranks: plain.train_bf16(tiny.reference(), 5, ranks=ranks, accumulation=2) for ranks in (1, 2)}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", scenarios.STAGES)
def test_masters_and_losses_follow_a_plain_fp32_master_reference(on_ranks, expected, ranks, stage):
    losses, masters = expected[ranks]
    for rank in on_ranks(ranks):
        found, _, found_masters, working = rank["bf16"][stage]
        assert found == pytest.approx(losses, rel=1e-5)
        for name, master in masters.items():
            assert found_masters[name].dtype == torch.float32
            torch.testing.assert_close(found_masters[name], master, rtol=1e-5, atol=1e-6)
            assert torch.equal(working[name], found_masters[name].bfloat16()), "working weights are rounded masters"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", scenarios.STAGES)
def test_gradients_are_summed_in_fp32_over_micro_batches_and_ranks(on_ranks, ranks, stage):
    model = tiny.reference().to(torch.bfloat16)
    for buffer, real in zip(model.buffers(), tiny.reference().buffers(), strict=True):
        buffer.data = real
    ids, counts = tiny.batch(0)
    expected = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    for rows, counted in zip(ids.chunk(2 * ranks), counts.chunk(2 * ranks), strict=True):
        tiny.token_loss(model(rows), rows, counted, counts.sum()).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad
            parameter.grad = None
    for rank in on_ranks(ranks):
        _, gradients, _, _ = rank["bf16"][stage]
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)
        rounded = [torch.equal(gradient, gradient.bfloat16().float()) for gradient in gradients.values()]
        assert not any(rounded), "a sum rounded to bf16 would lose what the masters are there to keep"


@pytest.mark.parametrize("ranks", [1, 2])
def test_sums_in_bf16_are_the_sums_in_fp32_rounded(on_ranks, ranks):
    for rank in on_ranks(ranks):
        for (stage, accumulation), (exact, narrow) in rank["bf16_sums"].items():
            for name, gradient in exact.items():
                kept = narrow[name]
                torch.testing.assert_close(kept, kept.bfloat16().float(), rtol=1e-6, atol=0)
                # One rounding for each addition here; a rank's own gradients arrive in bf16.
                error = (kept - gradient).abs().max() / gradient.abs().max()
                assert error <= 2**-8 * accumulation, (stage, accumulation, name)


def test_masters_start_as_precise_as_the_checkpoint(on_ranks):
    start = dict(tiny.reference().named_parameters())
    # Two steps of warm-up at 1.5e-3 and 3e-3, then at most 3e-3 each: Adam moves a weight by about lr a step.
    for stage in scenarios.STAGES:
        masters = on_ranks(2)[0]["bf16"][stage][2]
        name = "llama.model.norm.weight"
        moved = (masters[name] - start[name]).abs().max()
        assert 1e-4 < moved < 2e-2
        big = "llama.model.layers.0.mlp.up_proj.weight"
        assert not torch.equal(masters[big], masters[big].bfloat16().float())


def test_stages_one_two_and_three_agree_bit_for_bit(on_ranks):
    for rank in on_ranks(2):
        for stage in (1, 2):
            losses, gradients, masters, _ = rank["bf16"][stage]
            other_losses, other_gradients, other_masters, _ = rank["bf16"][3]
            assert losses == other_losses
            assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)
            assert all(torch.equal(masters[name], other_masters[name]) for name in masters)
