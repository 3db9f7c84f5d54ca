"""Generation in the middle of training: the same numbers, no other rank needed, and nothing left behind."""

import pytest
import torch

from tests.engine import scenarios, tiny

BOTH = [(ranks, stage) for ranks in (1, 2) for stage in scenarios.STAGES]


@pytest.fixture(scope="module")
def unwrapped():
    model = tiny.reference()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model.requires_grad_(False)


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_gathered_evaluated_sharded_and_unwrapped_forwards_are_equal(on_ranks, unwrapped, ranks, stage):
    expected = unwrapped(tiny.batch(50)[0])
    for rank in on_ranks(ranks):
        for logits in rank["hybrid"][stage]["logits"]:
            assert torch.equal(logits, expected)


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_ranks_may_stop_at_different_lengths(on_ranks, unwrapped, ranks, stage):
    expected = tiny.batch(50)[0][:2, :3]
    for _ in range(2 + 3 * (ranks - 1)):
        expected = torch.cat([expected, unwrapped(expected)[:, -1:].argmax(-1)], 1)
    for index, rank in enumerate(on_ranks(ranks)):
        tokens = rank["hybrid"][stage]["tokens"]
        assert tokens.shape[1] == 3 + 2 + 3 * index
        assert torch.equal(tokens, expected[:, : tokens.shape[1]])


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_after_generation_even_one_cut_short_training_goes_on_undisturbed(on_ranks, ranks, stage):
    for rank in on_ranks(ranks):
        found = rank["hybrid"][stage]
        sharded, training, gradients = found["state"]
        assert sharded == [ranks > 1 and stage > 0] * len(sharded)
        assert training
        assert gradients
        assert found["unchanged"]
        disturbed, undisturbed = found["curves"]
        assert disturbed == undisturbed


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_adapters_are_merged_for_generation_and_apart_again_after(on_ranks, ranks, stage):
    *_, steps_of_one = on_ranks(1)[0]["low_rank"][0]
    for rank in on_ranks(ranks):
        apart, together, same, steps = rank["low_rank"][stage]
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
        assert not torch.equal(together, apart), "merged weights round differently"
        assert same
        assert steps == pytest.approx(steps_of_one, rel=1e-5)
