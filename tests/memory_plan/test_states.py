"""Arithmetic on shapes, against numbers worked by hand and against what a real engine holds."""

import json
from dataclasses import replace

import pytest
import torch

from rlhf.config.engine_config import EngineConfig, OffloadDevice
from rlhf.config.stage_configs import LoraConfig, ModelKind, OptimizerConfig
from rlhf.engine.engine import build_engine
from rlhf.engine.offload.placement import Placement
from rlhf.memory_plan.plan import Place
from rlhf.memory_plan.states import States
from rlhf.memory_plan.trace import ModelShape
from rlhf.models.causal_lm import causal_lm
from rlhf.runtime.dist import World

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WIDTH, INNER, VOCABULARY, LAYERS = 32, 64, 128, 4
BLOCK = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
NUMEL = 2 * VOCABULARY * WIDTH + LAYERS * BLOCK + WIDTH


def settings(**changes):
    made = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY}
    made |= {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    return made | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape")
    (path / "config.json").write_text(json.dumps(settings()))
    return path


def states(folder, *, ranks=1, copies=1, device=CPU, dtype=torch.bfloat16, micro=1, lora=None, **engine):
    config = EngineConfig(**({"zero_stage": 0} | engine))
    spec = ModelShape(str(folder), ModelKind.causal_lm, lora=lora).whole
    settings = {
        "engine": config,
        "ranks": ranks,
        "copies": copies,
        "device": device,
        "dtype": dtype,
        "micro_batches": micro,
    }
    return States(role="model", spec=spec, **settings)


def at_rest(found):
    parts = {}
    for item in found.at_rest():
        parts[item.part, item.place] = parts.get((item.part, item.place), 0) + item.bytes
    return parts


def buffers(found):
    return sum(buffer.nbytes for buffer in found.spec.module.buffers())


def test_sixteen_bytes_an_element_without_zero(folder):
    """(2 + 2 + K) Psi of the ZeRO paper, K = 12."""
    found = states(folder)
    parts = at_rest(found)
    assert parts["working parameters", Place.device] == 2 * NUMEL + buffers(found)
    assert parts["master weights", Place.device] == 4 * NUMEL
    assert parts["moments", Place.device] == 8 * NUMEL
    assert sum(item.bytes for item in found.gradients()) == 2 * NUMEL


def test_copies_hold_the_same_and_share_the_writing(folder):
    """Eight ranks, of which four share a copy: a quarter each, and half of that in each rank's file."""
    found = states(folder, ranks=4, copies=2, zero_stage=3, shard_ranks=4)
    parts = at_rest(found)
    assert parts["moments", Place.device] == 8 * NUMEL // 4
    assert parts["working parameters", Place.device] == 2 * NUMEL // 4 + buffers(found)
    assert found.in_a_checkpoint() == found.copied_for_a_checkpoint() == 12 * NUMEL // 8


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_are_divided_by_the_ranks(folder, stage):
    found = states(folder, ranks=4, zero_stage=stage)  # all rows divide by 4
    parts = at_rest(found)
    assert parts["moments", Place.device] == 8 * NUMEL // 4
    assert parts["working parameters", Place.device] == 2 * NUMEL // 4 + buffers(found)
    assert sum(item.bytes for item in found.gradients()) == 4 * NUMEL // 4  # FSDP2 reduces in fp32
    assert found.whole() == 2 * NUMEL
    assert found.gathered() == 2 * NUMEL  # at stage 3 all that follows fits into the prefetch bucket


def test_rows_that_do_not_divide_are_padded(folder):
    found = states(folder, ranks=3, zero_stage=3)
    rows = 2 * 43 * WIDTH + LAYERS * (4 * 11 * WIDTH + 2 * 22 * WIDTH + 11 * INNER + 2 * 11) + 11
    assert at_rest(found)["moments", Place.device] == 8 * rows


def test_zero_3_holds_a_block_the_one_it_gathers_ahead_and_what_stays(folder):
    found = states(folder, ranks=4, zero_stage=3, prefetch_bucket_size=1)
    head = VOCABULARY * WIDTH
    assert found.gathered() == 2 * (WIDTH + head + max(2 * head, 2 * BLOCK, BLOCK + head))
    small = states(folder, ranks=4, zero_stage=3, prefetch_bucket_size=1, persistence_threshold=WIDTH + 1)
    vectors = (2 * LAYERS + 1) * WIDTH
    assert at_rest(small)["moments", Place.device] == 8 * ((NUMEL - vectors) // 4 + vectors)


def test_adapters_alone_have_states(folder):
    found = states(folder, lora=LoraConfig(rank=2, targets=["q_proj"]))
    learning = LAYERS * 2 * 2 * WIDTH
    assert at_rest(found)["moments", Place.device] == 8 * learning
    assert at_rest(found)["working parameters", Place.device] == 2 * (NUMEL + learning) + buffers(found)
    assert found.exported() == 4 * NUMEL, "merged weights may need fp32"
    assert states(folder).exported() == 2 * NUMEL


def test_bf16_moments_fp32_weights_and_frozen_models(folder):
    assert at_rest(states(folder, moments="bf16"))["moments", Place.device] == 4 * NUMEL
    assert ("master weights", Place.device) not in at_rest(states(folder, dtype=torch.float32))
    assert {part for part, _ in at_rest(states(folder, micro=0))} == {"working parameters"}
    assert sum(item.bytes for item in states(folder, micro=2).gradients()) == 4 * NUMEL


def test_a_checkpoint_has_masters_and_moments(folder):
    found = states(folder, zero_stage=1, offload_optimizer="cpu")
    assert found.in_a_checkpoint() == found.copied_for_a_checkpoint() == 12 * NUMEL


def test_a_moving_average_is_where_the_masters_are(folder):
    """Four bytes an element, in a checkpoint too, and a second folder of the model."""
    with_one, without = replace(states(folder), has_average=True), states(folder)
    assert at_rest(with_one)["average of weights", Place.device] == 4 * NUMEL
    assert with_one.in_a_checkpoint() == without.in_a_checkpoint() + 4 * NUMEL
    assert with_one.exported() == 2 * without.exported()
    on_host = replace(states(folder, zero_stage=1, device=CUDA, offload_optimizer=OffloadDevice.cpu), has_average=True)
    assert at_rest(on_host)["average of weights", Place.host] == 4 * NUMEL


def test_a_cuda_optimizer_on_the_host(folder):
    found = states(folder, device=CUDA, micro=2, zero_stage=1, offload_optimizer="cpu")
    parts = at_rest(found)
    assert parts["master weights", Place.host] == 4 * NUMEL
    assert parts["moments", Place.host] == 8 * NUMEL
    assert ("moments", Place.device) not in parts
    assert {(i.place, i.bytes) for i in found.gradients()} == {(Place.host, 4 * NUMEL)}
    half = at_rest(states(folder, device=CUDA, zero_stage=1, offload_optimizer="cpu", optimizer_share=0.5))
    assert half["moments", Place.host] + half["moments", Place.device] == 8 * NUMEL
    assert half["moments", Place.host] >= 4 * NUMEL


LARGEST = max(VOCABULARY * WIDTH, BLOCK)  # of what is reduced at once


@pytest.mark.parametrize(
    ("stage", "dtype", "micro", "sent", "sums"),
    [
        (0, torch.bfloat16, 1, 2 * LARGEST, 2 * NUMEL),
        (0, torch.bfloat16, 2, 2 * LARGEST, 4 * NUMEL),
        (0, torch.float32, 1, 2 * LARGEST, 2 * NUMEL),
        (1, torch.bfloat16, 1, (2 + 2) * LARGEST, 2 * NUMEL // 4),
        (1, torch.bfloat16, 2, (2 + 2) * LARGEST + 2 * NUMEL, 4 * NUMEL // 4),
        (3, torch.bfloat16, 1, (2 + 2) * LARGEST, 2 * NUMEL // 4),
        (3, torch.float16, 1, (2 + 2) * LARGEST, 2 * NUMEL // 4),
        (3, torch.float32, 1, (4 + 2) * LARGEST, 4 * NUMEL // 4),
        (3, torch.bfloat16, 2, (2 + 2) * LARGEST, 4 * NUMEL // 4),
    ],
)
def test_gradients_that_are_sent_in_bf16(folder, stage, dtype, micro, sent, sums):
    """Buffers and sums, by hand; in fp32 both are wider by two bytes an element, but for sums of micro-batches."""
    options = {"ranks": 4, "zero_stage": stage, "dtype": dtype, "micro": micro}
    narrow, wide = (states(folder, reduce_dtype=reduced, **options) for reduced in ("bf16", "fp32"))
    assert narrow.in_reduction() == sent
    assert wide.in_reduction() - sent == 2 * LARGEST + (2 * NUMEL if (stage, micro) == (1, 2) else 0)
    assert sum(item.bytes for item in narrow.gradients()) == sums
    assert sum(item.bytes for item in wide.gradients()) == 4 * NUMEL // (4 if stage else 1)


@pytest.mark.parametrize(
    ("settings", "micro", "ranks", "gradients", "masters", "moments"),
    [
        ({}, 1, 1, 2, 4, 8),
        ({}, 2, 1, 4, 4, 8),
        ({}, 1, 4, 4, 4, 8),
        ({"grad_accum_dtype": "bf16"}, 2, 4, 2, 4, 8),
        ({"master_weights": "split", "moments": "bf16"}, 1, 1, 2, 2, 4),
        ({"master_weights": "split", "moments": "int8"}, 1, 1, 2, 2, 2.03),
    ],
)
def test_bytes_of_a_parameter_on_the_host(folder, settings, micro, ranks, gradients, masters, moments):
    engine = {"zero_stage": 2, "offload_optimizer": "cpu", **settings}
    found = states(folder, device=CUDA, micro=micro, ranks=ranks, **engine)
    parts = at_rest(found)
    assert sum(item.bytes for item in found.gradients()) == gradients * NUMEL // ranks
    assert parts["master weights", Place.host] == masters * NUMEL // ranks
    assert parts["moments", Place.host] == pytest.approx(moments * NUMEL // ranks, rel=0.05)  # vectors fill blocks


def test_buffers_are_all_the_host_memory_of_a_tier_on_disk(folder):
    offload = {"zero_stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme", "nvme_path": "/disk"}
    parts = at_rest(states(folder, device=CUDA, buffer_count=3, buffer_size=1_000_000, **offload))
    assert parts["working parameters", Place.disk] >= 2 * NUMEL
    assert parts["moments", Place.disk] >= 8 * NUMEL
    assert not [key for key in parts if key[0] in ("moments", "master weights") and key[1] is not Place.disk]
    assert parts["buffers", Place.host] >= 2 * 3 * 4_000_000  # one set for weights, one for states


def test_buffers_are_resident_as_far_as_they_are_filled(folder):
    """Weights and states of 6 MB and less pass through buffers of 400 MB; page-locked ones are resident whole."""
    offload = {"zero_stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme", "nvme_path": "/disk"}
    found = {
        device: at_rest(states(folder, device=device, buffer_count=3, buffer_size=100_000_000, **offload))
        for device in (CPU, CUDA)
    }
    huge = 2 << 20
    assert NUMEL * 2 < huge > 16 * 4096 * 14
    assert found[CPU]["buffers", Place.host] == 3 * (huge + huge)
    assert found[CUDA]["buffers", Place.host] >= 2 * 3 * 400_000_000


@pytest.mark.parametrize("share", [0.07, 0.5, 0.93])
def test_shards_that_do_not_divide_are_cut_where_the_engine_cuts(folder, share):
    """Rows are padded more where there are fewer: shares of local rows are not shares of the model."""
    found = states(folder, ranks=100, device=CUDA, zero_stage=2, offload_optimizer="cpu", optimizer_share=share)
    groups = [group for unit in found.units if (group := unit.group(found.spec.module))]
    config = found.engine
    world = World(0, 100, CUDA)
    stores = Placement(groups, OptimizerConfig(lr=1e-3), engine=config, world=world, offloaded=None).split()
    local = [sum(-(-p.shape[0] // 100) * p[0].numel() for group in part for p in group.values()) for part in stores]
    parts = at_rest(found)
    masters = [parts.get(("master weights", place), 0) for place in (Place.host, Place.device)]
    assert masters == [4 * count for count in local]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_real_engine_holds_what_was_planned(tmp_path, precision):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**settings())).save_pretrained(tmp_path)
    engine = build_engine(
        causal_lm(tmp_path),
        config=EngineConfig(zero_stage=0, precision=precision),
        world=World.alone(),
        optimizer=OptimizerConfig(lr=1e-3),
        total_steps=10,
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    parts = at_rest(states(tmp_path, dtype=dtype))
    held = sum(parameter.nbytes for parameter in engine.module.parameters()) + sum(
        buffer.nbytes for buffer in engine.module.buffers()
    )
    assert parts["working parameters", Place.device] == held
    moments = sum(stored.nbytes for stored in engine.checkpoint_tensors() if "exp_avg" in stored.key)
    assert parts["moments", Place.device] == moments


def test_files_of_a_real_engine_are_as_large_as_planned(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**settings())).save_pretrained(tmp_path / "model")
    config = EngineConfig(
        zero_stage=1,
        precision="bf16",
        offload_optimizer=OffloadDevice.nvme,
        nvme_path=str(tmp_path / "disk"),
        buffer_size=100_000,
    )
    (tmp_path / "disk").mkdir()
    engine = build_engine(
        causal_lm(tmp_path / "model"),
        config=config,
        world=World.alone(),
        optimizer=OptimizerConfig(lr=1e-3),
        total_steps=10,
    )
    found = sum(store._resources.file.nbytes for store in engine._updater.optimizer.stores)
    offload = {
        "zero_stage": 1,
        "offload_optimizer": "nvme",
        "nvme_path": str(tmp_path / "disk"),
        "buffer_size": 100_000,
    }
    planned = sum(item.bytes for item in states(tmp_path / "model", **offload).at_rest() if item.place is Place.disk)
    assert found == pytest.approx(planned, abs=4096)
    del engine
