"""The update in tiles is the update in one piece, bit for bit."""

import pytest
import torch

from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.adam_kernel import VECTOR_ELEMENTS, AdamKernel, ParameterSlice

CONFIG = OptimizerConfig(lr=1e-3, weight_decay=0.1, betas=[0.9, 0.95])
CPU = torch.device("cpu")
SIZES = (1, 63, 64, 65, 100_003)


def pieces(*, gradients=torch.float32, moments=torch.float32):
    """One of each size, two updates old; the odd ones decay."""
    generator = torch.Generator().manual_seed(3)

    def random(n, dtype, scale=1.0):
        return (torch.randn(n, generator=generator) * scale).to(dtype)

    return [
        ParameterSlice(
            str(n),
            0,
            n % 2 == 1,
            torch.tensor(3.0),
            random(n, torch.float32),
            random(n, gradients, 1e-2),
            random(n, moments, 1e-3),
            random(n, moments, 1e-3).square(),
        )
        for n in SIZES
    ]


def updated(made, *, limit, scale=1.0):
    kernel = AdamKernel(CONFIG, CPU, limit=limit)
    tiles = list(kernel.update(made, lr=0.01, scale=scale))
    assert all(sum(piece.weight.numel() for piece in tile) <= limit for tile in tiles)
    assert all(piece.start % VECTOR_ELEMENTS == 0 for tile in tiles for piece in tile)
    assert sum(piece.weight.numel() for tile in tiles for piece in tile) == sum(SIZES)
    return made


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_no_tiling_changes_a_bit(scale, gradients, moments):
    whole = updated(pieces(gradients=gradients, moments=moments), limit=1 << 20, scale=scale)
    for limit in (64, 192, 8192):
        cut = updated(pieces(gradients=gradients, moments=moments), limit=limit, scale=scale)
        for a, b in zip(whole, cut, strict=True):
            assert torch.equal(a.weight, b.weight)
            assert torch.equal(a.exp_avg, b.exp_avg)
            assert torch.equal(a.exp_avg_sq, b.exp_avg_sq)


@pytest.mark.parametrize(("decay", "index"), [(0.1, 4), (0.0, 2)])
def test_it_is_torch_optim_with_the_gradient_cast_and_scaled(decay, index):
    piece = pieces(gradients=torch.bfloat16)[index]
    weight = torch.nn.Parameter(piece.weight.clone())
    weight.grad = piece.gradient.float() * 0.37
    reference = torch.optim.AdamW([weight], lr=0.01, weight_decay=decay, betas=(0.9, 0.95), foreach=False)
    reference.state[weight] = {
        "step": torch.tensor(2.0),
        "exp_avg": piece.exp_avg.clone(),
        "exp_avg_sq": piece.exp_avg_sq.clone(),
    }
    reference.step()
    list(AdamKernel(CONFIG, CPU).update([piece], lr=0.01, scale=0.37))
    torch.testing.assert_close(piece.weight, weight.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(piece.exp_avg, reference.state[weight]["exp_avg"], rtol=1e-6, atol=1e-9)


def test_gradients_that_are_cast_or_scaled_stay_as_they_are():
    made = pieces(gradients=torch.bfloat16)
    before = [piece.gradient.clone() for piece in made]
    updated(made, limit=1 << 20, scale=0.5)
    assert all(torch.equal(piece.gradient, old) for piece, old in zip(made, before, strict=True))
