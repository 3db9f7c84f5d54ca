"""What travels together, and what is gathered ahead of use."""

import pytest
import torch
from torch import nn

from rlhf.config.engine_config import EngineConfig
from rlhf.engine.fsdp_units import FSDPUnit, find_units, prefetched_units
from rlhf.engine.sharding import shard
from rlhf.runtime.dist import World
from tests.engine import tiny

BLOCK = sum(p.numel() for p in tiny.reference().llama.model.layers[0].parameters())


def units(config=None, **kind):
    return find_units(tiny.spec(**kind), config=config or EngineConfig(zero_stage=3))


def owners(found):
    return [[name.removeprefix("llama.") for name in unit.names] for unit in found]


def test_an_embedding_a_head_and_every_block_travel_on_their_own_in_forward_order():
    root, embedding, *blocks, head = units()
    assert owners([root, embedding, head]) == [["model.norm.weight"], ["model.embed_tokens.weight"], ["lm_head.weight"]]
    assert [len(unit.names) for unit in blocks] == [9, 9, 9]
    assert [unit.numel for unit in blocks] == [BLOCK] * 3
    assert [unit.needed_in_backward for unit in (root, embedding, *blocks, head)] == [
        True,
        False,
        True,
        True,
        True,
        True,
    ]


def test_backward_gathers_no_block_below_the_first_that_learns():
    def needed(learns):
        return [unit.needed_in_backward for unit in find_units(tiny.spec(learns), config=EngineConfig(zero_stage=3))]

    assert needed(lambda name: ".layers.1." in name) == [True, False, False, True, True, True]
    # A gradient for the embedding passes through every block.
    assert needed(lambda name: ".layers.1." in name or "embed" in name) == [True, False, True, True, True, True]


def test_a_tied_matrix_stays_with_the_root_whose_forward_uses_it_twice():
    found = units(tied=True)
    assert owners(found)[0] == ["model.embed_tokens.weight", "model.norm.weight"]
    assert len(found) == 1 + 3


def test_parameters_of_the_model_itself_and_heads_of_one_row_stay_with_the_root():
    found = units(odd=True)
    assert owners(found)[0] == ["gain", "spare", "model.norm.weight"]
    plan = tiny.spec()
    plan.module.score = nn.Linear(32, 1, bias=False, device="meta")
    assert "score.weight" in find_units(plan, config=EngineConfig(zero_stage=3))[0].names


def test_every_parameter_is_in_one_unit_once():
    for kind in ({}, {"tied": True}, {"odd": True}):
        names = [name for unit in units(**kind) for name in unit.names]
        assert sorted(names) == sorted(name for name, _ in tiny.reference(**kind).named_parameters())


@pytest.mark.parametrize(
    ("stage", "bucket", "blocks"),
    [(2, 0, [1, 1, 1]), (2, BLOCK, [1, 1, 1]), (2, 2 * BLOCK, [2, 1]), (0, 3 * BLOCK, [3]), (3, 3 * BLOCK, [1, 1, 1])],
)
def test_a_reduce_bucket_holds_as_many_consecutive_blocks_as_fit_below_zero_three(stage, bucket, blocks):
    found = units(EngineConfig(zero_stage=stage, reduce_bucket_size=bucket))
    assert [len(unit.modules) for unit in found[2:-1]] == blocks


def ahead(sizes, **config):
    found = [FSDPUnit([nn.Identity()], numel=size) for size in sizes]
    lists = prefetched_units(found, config=EngineConfig(zero_stage=3, **config))
    return [[found.index(unit) for unit in following] for following in lists]


def test_units_are_gathered_ahead_until_they_fill_the_prefetch_bucket():
    assert ahead([5, 10, 10, 10], prefetch_bucket_size=0) == [[], [], [], []]
    assert ahead([5, 10, 10, 10], prefetch_bucket_size=1) == [[1], [2], [3], []]
    assert ahead([5, 10, 10, 10], prefetch_bucket_size=11) == [[1, 2], [2, 3], [3], []]


def test_never_more_elements_are_live_than_allowed():
    assert ahead([5, 10, 10, 10], prefetch_bucket_size=99, max_live_parameters=26) == [[1, 2], [2], [3], []]
    assert ahead([5, 10, 10, 10], prefetch_bucket_size=99, max_live_parameters=10) == [[], [], [], []]


def test_without_overlap_nothing_is_gathered_ahead():
    assert ahead([5, 10, 10, 10], overlap_comm=False) == [[], [], [], []]


def groups(learns=lambda name: True, **kind):
    plan = tiny.spec(learns, **kind)
    return shard(plan, config=EngineConfig(zero_stage=3), world=World.alone(), frozen=False).groups()


def test_groups_follow_the_forward_pass_and_leave_out_what_is_frozen():
    found = groups(lambda name: "lm_head" in name or ("up_proj" in name and "layers.1" not in name))
    assert [list(group) for group in found] == [
        ["llama.model.layers.0.mlp.up_proj.weight"],
        ["llama.model.layers.2.mlp.up_proj.weight"],
        ["llama.lm_head.weight"],
    ]


def test_a_tied_parameter_is_in_one_group_once():
    found = groups(tied=True)
    names = [name for group in found for name in group]
    assert names[0] == "llama.model.embed_tokens.weight"
    assert "llama.lm_head.weight" not in names
    assert len({id(parameter) for group in found for parameter in group.values()}) == len(names)
    assert all(parameter.device == torch.device("meta") for group in found for parameter in group.values())
