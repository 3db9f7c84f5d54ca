"""A rank reads its own rows and no others; an export gives back what was loaded; which type the weights have."""

import platform
from collections import Counter
from pathlib import Path

import pytest
import torch

from rlhf.config.engine_config import Precision
from rlhf.engine.materialize import working_dtype
from rlhf.runtime import dist
from tests.engine import scenarios, tiny

CPU = torch.device("cpu")
EVERY = [(ranks, stage) for ranks in (1, 2, 4) for stage in scenarios.STAGES]


@pytest.mark.parametrize(("ranks", "stage"), EVERY)
def test_a_rank_reads_its_own_rows_of_each_parameter_once(on_ranks, ranks, stage):
    sizes = {name: parameter.shape for name, parameter in tiny.reference().named_parameters()}
    shares = ranks if stage else 1
    together = Counter()
    for rank in on_ranks(ranks):
        reads, _ = rank["loading"][stage]
        assert [name for name, _ in reads] == list(sizes)
        for name, numel in reads:
            share = -(-sizes[name][0] // shares)  # no rank has more than the first
            assert numel <= share * sizes[name][1:].numel(), name
        together.update(dict(reads))
    copies = ranks // shares
    assert together == {name: copies * size.numel() for name, size in sizes.items()}


@pytest.mark.parametrize(("ranks", "stage"), EVERY)
def test_full_tensors_are_the_checkpoint(on_ranks, ranks, stage):
    expected = dict(tiny.reference().named_parameters())
    for rank in on_ranks(ranks):
        _, exported = rank["loading"][stage]
        assert list(exported) == list(expected)
        for name, tensor in exported.items():
            assert tensor.device.type == "cpu"
            assert torch.equal(tensor, expected[name])


def test_a_tied_parameter_is_exported_once_under_its_first_name(on_ranks):
    for ranks in (1, 2):
        _, weights, _ = on_ranks(ranks)[0]["tied"][3]
        assert "llama.model.embed_tokens.weight" in weights
        assert "llama.lm_head.weight" not in weights


def test_what_was_read_is_copied_so_that_training_never_changes_the_source(on_ranks):
    world = dist.start("cpu")
    plan = tiny.spec()
    before = {name: tensor.clone() for name, tensor in plan.weights.tensors.items()}
    engine = tiny.build_engine(
        plan,
        config=tiny.EngineConfig(zero_stage=0, precision="fp32"),
        world=world,
        optimizer=tiny.optimizer_config(),
        total_steps=10,
    )
    tiny.train_step(engine, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plan.weights.tensors.items())


def test_what_is_asked_for_is_used():
    assert working_dtype(Precision.fp32, CPU) == torch.float32
    assert working_dtype(Precision.bf16, CPU) == torch.bfloat16


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="reads /proc/cpuinfo")
def test_auto_takes_bf16_where_the_processor_says_it_multiplies_it():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = torch.bfloat16 if flags & {"avx512_bf16", "amx_tile"} else torch.float32
    assert working_dtype(Precision.auto, CPU) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_cuda_follows_the_compute_capability():
    expected = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    assert working_dtype(Precision.auto, torch.device("cuda")) == expected
