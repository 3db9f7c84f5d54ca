"""Masters in half their bytes, bit for bit; moments in 8 bits, within the bounds that the module states."""

import numpy as np
import pytest
import torch

from rlhf.config.engine_config import EngineConfig
from rlhf.engine.state_format import BLOCK, Quantised, SplitMaster, StateFormat, num_blocks, pack, unpack

CPU = torch.device("cpu")
STEP = torch.tensor(1.0)


def split(masters):
    """Masters that have been split and put together again, and the bf16 working weights."""
    working = torch.zeros(masters.numel(), dtype=torch.bfloat16)
    stored = SplitMaster(torch.zeros(masters.numel(), dtype=torch.int16), working.__getitem__)
    rounded = pack(stored, masters.clone(), step=STEP)
    working.copy_(rounded)
    assert torch.equal(working.float()[~rounded.isnan()], rounded[~rounded.isnan()]), "bf16 holds it exactly"
    return unpack(stored, CPU), working


def patterns(*uppers):
    """Every lower half below each of some upper halves of fp32."""
    bits = (np.array(uppers, dtype=np.uint32)[:, None] << 16) | np.arange(1 << 16, dtype=np.uint32)[None]
    return torch.from_numpy(bits.reshape(-1).view(np.float32))


def bits_of(values):
    return values.view(torch.int32)


@pytest.mark.parametrize(
    "uppers",
    [
        (0x0000, 0x8000, 0x0001, 0x8001),  # zeros and subnormals of both signs
        (0x007F, 0x0080, 0x807F),  # from subnormal to normal
        (0x3F80, 0x3F81, 0xBF80, 0xBF81),  # around one: even and odd
        (0x3FFF, 0x407F, 0xC07F),  # the carry reaches the exponent
        (0x7F7E, 0x7F7F, 0xFF7F),  # the largest: rounded, they are infinite
        (0x7F80, 0xFF80, 0x7FC0, 0x7F81),  # infinities and NaNs
    ],
)
def test_every_bit_of_a_master_comes_back(uppers):
    masters = patterns(*uppers)
    found, working = split(masters)
    finite = masters.isfinite()
    assert torch.equal(bits_of(found)[finite], bits_of(masters)[finite])
    assert torch.equal(found.isnan(), masters.isnan())
    assert not working[~finite].isfinite().any(), "no weight hides that its master is not finite"


def test_working_weights_are_the_nearest_and_ties_go_away_from_zero():
    masters = torch.cat([patterns(0x3F80, 0x3F81, 0xBF80, 0xBF81, 0x0001, 0x7F7F), torch.randn(1 << 20)])
    _, working = split(masters)
    ties = (bits_of(masters) & 0xFFFF) == 0x8000
    assert ties.sum() >= 6
    assert torch.equal(working[~ties], masters.bfloat16()[~ties]), "as a cast rounds, but for ties"
    upper = bits_of(masters)[ties] >> 16
    assert torch.equal(working[ties].view(torch.int16).int(), (upper + 1).short().int())


def test_random_patterns_come_back():
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 22,), generator=torch.Generator().manual_seed(0))
    masters = bits.int().view(torch.float32)
    found, _ = split(masters)
    finite = masters.isfinite()
    assert torch.equal(bits_of(found)[finite], bits_of(masters)[finite])


def quantised(numel, *, signed):
    codes = torch.zeros(num_blocks(numel) * BLOCK, dtype=torch.int8 if signed else torch.uint8)
    return Quantised(codes, torch.zeros(num_blocks(numel)), numel)


def wide(numel, *, signed):
    """Values over twelve orders of magnitude."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(numel, generator=generator) * 10 ** (12 * torch.rand(numel, generator=generator) - 12)
    return values if signed else values.square()


def relative(values):
    """By the largest of each block of 256, in fp64."""
    padded = torch.zeros(num_blocks(values.numel()) * BLOCK, dtype=torch.float64)
    padded[: values.numel()] = values
    largest = padded.view(-1, BLOCK).abs().amax(1, keepdim=True)
    return (padded.view(-1, BLOCK) / largest.clamp(min=1e-300)).view(-1)[: values.numel()]


@pytest.mark.parametrize("numel", [1, 255, 256, 1000, 100_000])
@pytest.mark.parametrize("signed", [True, False])
def test_a_root_is_within_a_step_and_the_largest_is_exact(signed, numel):
    values = wide(numel, signed=signed)
    stored = quantised(numel, signed=signed)
    pack(stored, values, step=STEP)
    found = unpack(stored, CPU)
    exact, kept = relative(values), relative(found)
    if signed:  # rounded to the nearest: half a step
        roots = [x.abs().sqrt().copysign(x) for x in (exact, kept)]
        assert (roots[0] - roots[1]).abs().max() <= 0.5 / 127 + 1e-6
    else:
        roots = [x.sqrt().sqrt() for x in (exact, kept)]
        assert (roots[0] - roots[1]).abs().max() <= 1 / 255 + 1e-6
        assert found[values > 0].all(), "none of them becomes zero"
    top = exact.abs() == 1
    assert top.sum() >= num_blocks(numel)
    assert torch.equal(found[top], values[top])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-27, 1.0, 1e14])
def test_what_is_stored_again_stays_as_it_is(signed, scale):
    stored = quantised(5000, signed=signed)
    pack(stored, wide(5000, signed=signed) * scale, step=STEP)
    before, codes, scales = unpack(stored, CPU), stored.codes.clone(), stored.scales.clone()
    for step in range(200):
        pack(stored, before.clone(), step=torch.tensor(float(step)))
        assert torch.equal(stored.codes[:5000], codes[:5000])
        assert torch.equal(stored.scales, scales)


@pytest.mark.parametrize("signed", [True, False])
def test_zeros_stay_zeros_or_next_to_nothing(signed):
    stored = quantised(1000, signed=signed)
    assert not unpack(stored, CPU).any()
    pack(stored, torch.zeros(1000), step=STEP)
    assert unpack(stored, CPU).max() <= (0 if signed else 1e-36)


@pytest.mark.parametrize("signed", [True, False])
def test_a_part_is_stored_as_it_is_in_the_whole(signed):
    values = wide(1500, signed=signed)
    whole, parts = quantised(1500, signed=signed), quantised(1500, signed=signed)
    pack(whole, values, step=STEP)
    for start, stop in ((0, 512), (512, 768), (768, 1500)):
        part = parts.cut(start, stop)
        pack(part, values[start:stop], step=STEP)
        assert torch.equal(unpack(part, CPU), unpack(whole, CPU)[start:stop])
    assert torch.equal(parts.codes[:1500], whole.codes[:1500])


def test_second_moments_follow_a_slow_decay_on_average():
    """A gradient that shrinks to a tenth: after 3000 steps at a decay of 0.999, second moments have followed it."""
    stored, beta = quantised(4096, signed=False), 0.999
    exact = torch.ones(4096)
    pack(stored, exact, step=STEP)
    target = torch.full((4096,), 0.01)
    target[::BLOCK] = 1.0  # one element of each block stays large: the others cannot shrink by their scale alone
    for step in range(3000):
        exact = beta * exact + (1 - beta) * target
        pack(stored, beta * unpack(stored, CPU) + (1 - beta) * target, step=torch.tensor(float(step)))
    found = unpack(stored, CPU)
    assert found.mean().item() == pytest.approx(exact.mean().item(), rel=0.05)
    assert (found / exact).sqrt().std() < 0.15


@pytest.mark.parametrize(
    ("settings", "dtype", "expected"),
    [
        ({}, torch.bfloat16, (4, 8, torch.float32)),
        ({"moments": "bf16"}, torch.bfloat16, (4, 4, torch.float32)),
        ({"moments": "int8"}, torch.bfloat16, (4, 2 + 8 / 256, torch.float32)),
        ({"master_weights": "split", "grad_accum_dtype": "bf16"}, torch.bfloat16, (2, 8, torch.bfloat16)),
        ({"master_weights": "split", "grad_accum_dtype": "bf16"}, torch.float32, (4, 8, torch.float32)),
        (
            {"master_weights": "split", "zero_stage": 3, "offload_param": "nvme", "nvme_path": "/x"},
            torch.bfloat16,
            (4, 8, torch.float32),
        ),
    ],
)
def test_bytes_of_an_element(settings, dtype, expected):
    format_ = StateFormat.of(EngineConfig(**({"zero_stage": 0} | settings)), dtype)
    moments = format_.nbytes("exp_avg", 10 * BLOCK) + format_.nbytes("exp_avg_sq", 10 * BLOCK)
    assert (format_.nbytes("weight", 10) / 10, moments / (10 * BLOCK), format_.sums) == expected


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("setting", [{"master_weights": "split"}, {"grad_accum_dtype": "bf16"}])
def test_both_need_bf16_weights(setting, precision):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"engine.{name}={value}: expected engine.precision=bf16 or auto"):
        EngineConfig(zero_stage=0, precision=precision, **setting)
