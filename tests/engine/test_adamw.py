"""AdamW by hand, its state one tensor at a time, and settings that it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.adamw import AdamW
from rlhf.runtime.dist import World

# Adam's first step moves every weight by lr against the sign of its gradient; decay takes lr * 0.1 of the weight first.
CONFIG = OptimizerConfig(lr=1.0, weight_decay=0.1, eps=0.0, betas=[0.9, 0.99])
DEVICES = ("none", "cpu", "nvme")


@pytest.fixture(params=DEVICES)
def optimizer(request, tmp_path, monkeypatch):
    """`optimizer(group, masters)` with its state on each offload device; on the host, copies are forced."""
    monkeypatch.setattr("rlhf.engine.offload.placement.has_own_memory", lambda device: True)
    engine = EngineConfig(zero_stage=1, offload_optimizer=request.param, nvme_path=str(tmp_path), buffer_size=8192)
    made = []

    def make(group, masters=()):
        made.append(adamw(group, engine, masters))
        return made[-1]

    yield make
    for adam in made:
        adam.close()
    assert not any(tmp_path.iterdir()), "files are removed"


def adamw(group, engine, masters=()):
    """An optimizer whose masters are the working weights, where others are not given."""
    adam = AdamW([group], config=CONFIG, engine=engine, world=World.alone())
    for name, shard in (group | dict(masters)).items():
        adam.set_master(name, shard.detach().float())
    return adam


def step(adam, gradients, **options):
    for name, gradient in gradients.items():
        adam.store_of(name).gradients.add(name, gradient.flatten())
    adam.step(set(gradients), **options)


def matrix_and_vector():
    return {"matrix": nn.Parameter(torch.tensor([[2.0, -4.0]])), "vector": nn.Parameter(torch.tensor([2.0, -4.0]))}


def test_the_first_step_by_hand_decays_matrices_only(optimizer):
    group = matrix_and_vector()
    gradients = {"matrix": torch.tensor([[0.5, -3.0]]), "vector": torch.tensor([0.5, -3.0])}
    step(optimizer(group), gradients, lr=0.1)
    torch.testing.assert_close(group["matrix"].data, torch.tensor([[2 * 0.99 - 0.1, -4 * 0.99 + 0.1]]))
    torch.testing.assert_close(group["vector"].data, torch.tensor([1.9, -3.9]))


@pytest.mark.parametrize(("limit", "tiles"), [(256, [256, 256, 256]), (512, [512, 256]), (1000, [768])])
def test_sub_groups_bound_what_the_host_updates_at_once(monkeypatch, limit, tiles):
    monkeypatch.setattr("rlhf.engine.offload.placement.has_own_memory", lambda device: True)
    engine = EngineConfig(zero_stage=1, offload_optimizer="cpu", sub_group_size=limit)
    seen, kernel = [], torch._fused_adamw_

    def recorded(weights, *args, **options):
        seen.append(sum(weight.numel() for weight in weights))
        return kernel(weights, *args, **options)

    monkeypatch.setattr(torch, "_fused_adamw_", recorded)
    step(adamw({"w": nn.Parameter(torch.ones(768))}, engine), {"w": torch.ones(768)}, lr=1)
    assert seen == tiles


def test_moments_and_bias_correction_by_hand_over_two_steps(optimizer):
    group = {"vector": nn.Parameter(torch.tensor([1.0]))}
    adam = optimizer(group)
    step(adam, {"vector": torch.tensor([1.0])}, lr=0.1)
    step(adam, {"vector": torch.tensor([3.0])}, lr=0.1)
    assert adam.steps() == {"vector": 2}
    assert adam.read_shard("vector", "exp_avg").item() == pytest.approx(0.9 * 0.1 + 0.1 * 3)  # 0.39
    assert adam.read_shard("vector", "exp_avg_sq").item() == pytest.approx(0.99 * 0.01 + 0.01 * 9)  # 0.0999
    second = (0.39 / 0.19) / (0.0999 / 0.0199) ** 0.5
    assert group["vector"].item() == pytest.approx(1 - 0.1 - 0.1 * second)


def test_the_scale_multiplies_the_gradient(optimizer):
    adam = optimizer({"vector": nn.Parameter(torch.tensor([1.0]))})
    step(adam, {"vector": torch.tensor([8.0])}, lr=0.1, scale=0.25)
    assert adam.read_shard("vector", "exp_avg").item() == pytest.approx(0.2)


def test_micro_batches_add_up_in_fp32_and_the_norm_is_that_of_their_sum(optimizer):
    adam = optimizer({"vector": nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))}, {"vector": torch.zeros(3)})
    parts = torch.tensor([[256.0, 3.0, 0.0], [1.0, 4.0, 0.0], [1.0, 5.0, 2.0]])  # in bf16, 256 + 1 is 256
    for part in parts:
        adam.store_of("vector").gradients.add("vector", part.bfloat16())
    assert adam.store_of("vector").gradients.squared_norms()["vector"].item() == pytest.approx(
        258**2 + 12**2 + 2**2, rel=1e-6
    )
    adam.step({"vector"}, lr=0.1)
    assert adam.read_shard("vector", "exp_avg").tolist() == pytest.approx([25.8, 1.2, 0.2])


def test_what_is_cleared_is_in_no_step(optimizer):
    adam = optimizer({"vector": nn.Parameter(torch.zeros(2))})
    adam.store_of("vector").gradients.add("vector", torch.full((2,), torch.nan))
    adam.store_of("vector").gradients.clear()
    assert adam.store_of("vector").gradients.squared_norms() == {}
    step(adam, {"vector": torch.ones(2)}, lr=0.1)
    assert adam.read_shard("vector", "exp_avg").tolist() == pytest.approx([0.1, 0.1])


def test_a_parameter_without_gradient_is_left_alone_and_keeps_its_count(optimizer):
    group = matrix_and_vector()
    adam = optimizer(group)
    step(adam, {"vector": torch.ones(2)}, lr=0.1)
    assert torch.equal(group["matrix"].data, torch.tensor([[2.0, -4.0]]))
    assert adam.steps() == {"matrix": 0, "vector": 1}


def test_small_updates_add_up_in_the_masters_and_only_then_reach_bf16(optimizer):
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    adam = optimizer({"weight": weight}, [("weight", torch.ones(1))])
    seen = []
    for _ in range(4):  # bf16 is spaced by 2^-8 below 1, and rounds at half of that: 0.00195
        step(adam, {"weight": torch.ones(1)}, lr=0.001)
        seen.append(weight.item())
    assert seen == [1.0, 1 - 2**-8, 1 - 2**-8, 1 - 2**-8]
    assert adam.read_shard("weight", "weight").item() == pytest.approx(0.996, abs=1e-6)


def test_a_state_goes_from_one_optimizer_to_another_tensor_by_tensor(optimizer):
    generator = torch.Generator().manual_seed(0)
    start = {"big": torch.randn(70, 90, generator=generator), "one": torch.ones(1), "none": torch.ones(0, 4)}
    groups = [{name: nn.Parameter(tensor.bfloat16()) for name, tensor in start.items()} for _ in range(2)]
    first, second = optimizer(groups[0], start.items()), optimizer(groups[1])
    gradients = [{n: torch.randn(p.shape, generator=generator) for n, p in start.items()} for _ in range(4)]
    for gradient in gradients[:2]:
        step(first, gradient, lr=0.1)
    for name, part in first.entries():
        second.write_shard(name, first.read_shard(name, part).clone(), key=part)
    second.load_steps(first.steps())
    assert all(torch.equal(groups[0][name], groups[1][name]) for name in start), "working weights follow"
    for gradient in gradients[2:]:
        step(first, gradient, lr=0.1)
        step(second, gradient, lr=0.1)
    for name, part in first.entries():
        assert first.read_shard(name, part).shape == start[name].shape
        assert torch.equal(first.read_shard(name, part), second.read_shard(name, part))
    assert second.steps() == {"big": 4, "one": 4, "none": 4}


@pytest.mark.parametrize("device", DEVICES)
def test_a_state_goes_from_wider_to_narrower_types_and_back(tmp_path, monkeypatch, device):
    monkeypatch.setattr("rlhf.engine.offload.placement.has_own_memory", lambda device: True)
    generator = torch.Generator().manual_seed(0)
    start = {"big": torch.randn(70, 90, generator=generator), "one": torch.ones(1), "none": torch.ones(0, 4)}
    settings = {"zero_stage": 1, "offload_optimizer": device, "nvme_path": str(tmp_path), "buffer_size": 11264}
    kinds = [{}, {"moments": "int8", "master_weights": "split"}, {"moments": "bf16"}]
    groups = [{name: nn.Parameter(tensor.bfloat16()) for name, tensor in start.items()} for _ in kinds]
    made = [
        adamw(group, EngineConfig(**settings, **kind), start.items()) for group, kind in zip(groups, kinds, strict=True)
    ]
    for _ in range(2):
        step(made[0], {n: torch.randn(p.shape, generator=generator) for n, p in start.items()}, lr=0.1)
    wide, packed, narrow = made
    for source, target in ((wide, packed), (packed, narrow), (packed, wide)):
        for name, part in source.entries():
            target.write_shard(name, source.read_shard(name, part).clone(), key=part)
            found, sent = target.read_shard(name, part), source.read_shard(name, part)
            largest = sent.abs().max().item() if sent.numel() else 0
            if part == "weight" or target is wide:
                assert torch.equal(found, sent)
            else:
                torch.testing.assert_close(found, sent, rtol=0.05, atol=0.02 * largest)
    assert all(torch.equal(groups[0][name], group[name]) for name in start for group in groups[1:])
    for adam in made:
        adam.close()


@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
def test_buffers_too_small_for_a_tile_are_refused_with_the_least_that_works(tmp_path, moments):
    # Tiles are made of 2048 elements, of 16 or 12 bytes each; in 8 bits of 4096, of 10 bytes, and a page of scales.
    least = {"fp32": 8192, "bf16": 6144, "int8": 11264}[moments]
    group = {"weight": nn.Parameter(torch.ones(1))}
    for size in (least - 1024, least):
        engine = EngineConfig(
            zero_stage=1, offload_optimizer="nvme", nvme_path=str(tmp_path), buffer_size=size, moments=moments
        )
        if size == least:
            adamw(group, engine).close()
            continue
        with pytest.raises(ValueError, match=f"engine.buffer_size={size}: expected {least}"):
            adamw(group, engine)


def test_adapters_have_a_rate_of_their_own_and_decay_by_it(optimizer, monkeypatch):
    monkeypatch.setattr("tests.engine.test_adamw.CONFIG", replace(CONFIG, lora_lr=5.0))
    adapter = "layer.lora_B.default.weight"
    group = matrix_and_vector() | {adapter: nn.Parameter(torch.tensor([[2.0, -4.0]]))}
    adam = optimizer(group)
    gradients = {"matrix": torch.tensor([[0.5, -3.0]]), "vector": torch.tensor([0.5, -3.0])}
    step(adam, gradients | {adapter: torch.tensor([[0.5, -3.0]])}, lr=0.1)  # a tenth of 1, so of 5 it is 0.5
    torch.testing.assert_close(group["matrix"].data, torch.tensor([[2 * 0.99 - 0.1, -4 * 0.99 + 0.1]]))
    torch.testing.assert_close(group["vector"].data, torch.tensor([1.9, -3.9]))
    torch.testing.assert_close(group[adapter].data, torch.tensor([[2 * 0.95 - 0.5, -4 * 0.95 + 0.5]]))
