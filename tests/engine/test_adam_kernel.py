"""The update in tiles is the update in one piece, bit for bit."""

import pytest
import torch

from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.adam_kernel import AdamKernel, ParameterSlice
from rlhf.engine.state_format import BLOCK, Quantised, SplitMaster, num_blocks, pack, unpack

CONFIG = OptimizerConfig(lr=1e-3, weight_decay=0.1, betas=[0.9, 0.95])
CPU = torch.device("cpu")
SIZES = (1, 255, 256, 257, 100_003)


def pieces(*, gradients=torch.float32, moments=torch.float32, split=False):
    """One of each size, two updates old; the odd ones decay."""
    generator = torch.Generator().manual_seed(3)

    def moment(values, codes):
        if moments != torch.int8:
            return values.to(moments)
        blocks = num_blocks(values.numel())
        codes = torch.zeros(blocks * BLOCK, dtype=codes)
        stored = Quantised(codes, torch.zeros(blocks), values.numel())
        pack(stored, values, step=torch.tensor(3.0))
        return stored

    def master(values):
        if not split:
            return values
        working = torch.zeros(values.numel(), dtype=torch.bfloat16)
        stored = SplitMaster(torch.zeros(values.numel(), dtype=torch.int16), working.__getitem__)
        working.copy_(pack(stored, values, step=torch.tensor(3.0)))
        return stored

    def random(n, dtype, scale=1.0):
        return (torch.randn(n, generator=generator) * scale).to(dtype)

    return [
        ParameterSlice(
            str(n),
            0,
            n % 2 == 1,
            torch.tensor(3.0),
            master(random(n, torch.float32)),
            random(n, gradients, 1e-2),
            moment(random(n, torch.float32, 1e-3), torch.int8),
            moment(random(n, torch.float32, 1e-3).square(), torch.uint8),
        )
        for n in SIZES
    ]


def updated(made, *, limit, scale=1.0):
    kernel, total = AdamKernel(CONFIG, CPU, limit=limit), 0
    masters = {piece.name: piece.weight for piece in made}
    for tile in kernel.update(made, lr=0.01, scale=scale):
        assert sum(piece.weight.numel() for piece in tile) <= limit
        assert all(piece.start % BLOCK == 0 for piece in tile)
        total += sum(piece.weight.numel() for piece in tile)
        for piece in tile:
            master = masters[piece.name]
            if isinstance(master, SplitMaster):  # as the working weights follow
                master.working(slice(piece.start, piece.start + piece.weight.numel())).copy_(piece.weight)
    assert total == sum(SIZES)
    return made


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        for ours, theirs in zip(a.stored, b.stored, strict=True):
            assert torch.equal(unpack(ours, CPU), unpack(theirs, CPU))


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("split", [False, True])
def test_no_tiling_changes_a_bit(scale, gradients, moments, split):
    kind = {"gradients": gradients, "moments": moments, "split": split}
    whole = updated(pieces(**kind), limit=1 << 20, scale=scale)
    for limit in (256, 768, 8192):
        same(updated(pieces(**kind), limit=limit, scale=scale), whole)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16, torch.int8])
def test_split_masters_are_updated_as_whole_ones(moments):
    whole, split = (updated(pieces(moments=moments, split=kind), limit=8192, scale=0.37) for kind in (False, True))
    same(split, whole)


def test_moments_in_8_bits_are_those_of_an_update_in_fp32():
    """One update of the same moments: the weights are the same bits, and the new moments are within a step."""
    packed, plain = pieces(moments=torch.int8), pieces(moments=torch.int8)
    plain = [
        piece._replace(exp_avg=unpack(piece.exp_avg, CPU), exp_avg_sq=unpack(piece.exp_avg_sq, CPU)) for piece in plain
    ]
    for ours, exact in zip(updated(packed, limit=8192), updated(plain, limit=8192), strict=True):
        assert torch.equal(ours.weight, exact.weight)
        largest = exact.exp_avg.abs().max()
        torch.testing.assert_close(unpack(ours.exp_avg, CPU), exact.exp_avg, rtol=0.02, atol=0.01 * largest.item())
        torch.testing.assert_close(
            unpack(ours.exp_avg_sq, CPU).sqrt(), exact.exp_avg_sq.sqrt(), rtol=0.02, atol=2e-2 * largest.item()
        )


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
