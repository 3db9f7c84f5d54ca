"""Every stage on every number of ranks is the training that plain torch does in one process."""

import pytest
import torch

from tests.engine import plain, scenarios, tiny

EVERY = [(ranks, stage) for ranks in (1, 2, 4) for stage in scenarios.STAGES]
BOTH = [(ranks, stage) for ranks, stage in EVERY if ranks < 4]
EXACT = {"rtol": 0, "atol": 1e-5}


def assert_same_curves(found, expected):
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=0), f"step {step}: (loss, norm) {ours}, expected {theirs}"


def assert_same_weights(found, model, **tolerance):
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].detach(), **(tolerance or EXACT))


@pytest.fixture(scope="module")
def trained():
    model = tiny.reference()
    return model, plain.train(model, 10)


@pytest.mark.parametrize(("ranks", "stage"), EVERY)
def test_ten_steps_are_those_of_plain_torch(on_ranks, trained, ranks, stage):
    model, expected = trained
    assert expected[-1][0] < expected[0][0] - 0.1, "the reference itself must learn"
    for rank in on_ranks(ranks):
        found, weights = rank["parity"][stage]
        assert_same_curves(found, expected)
        assert_same_weights(weights, model, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_a_forward_before_the_step_leaves_nothing_outdated(on_ranks, trained, ranks, stage):
    expected = [norm for _, norm in trained[1][:3]]
    for rank in on_ranks(ranks):
        assert rank["peeked"][stage] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_tied_embeddings_stay_tied_and_learn_as_in_plain_torch(on_ranks, ranks, stage):
    model = tiny.reference(tied=True)
    expected = plain.train(model, 4)
    for rank in on_ranks(ranks):
        found, weights, shared = rank["tied"][stage]
        assert shared
        assert_same_curves(found, expected)
        assert_same_weights(weights, model)


@pytest.mark.parametrize(("ranks", "stage"), EVERY)
def test_odd_parameters_learn_and_unreached_ones_are_left_alone(on_ranks, ranks, stage):
    model = tiny.reference(odd=True)
    expected = plain.train(model, 3)
    for rank in on_ranks(ranks):
        found, weights = rank["odd"][stage]
        assert_same_curves(found, expected)
        assert_same_weights(weights, model)
        assert torch.equal(weights["spare"], torch.ones(3, 5))
        assert weights["gain"] != 1


@pytest.mark.parametrize(("ranks", "stage"), BOTH)
def test_frozen_parameters_beside_learning_ones_stay_bit_for_bit(on_ranks, ranks, stage):
    model = tiny.reference()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(scenarios.is_adapter(name))
    expected = plain.train(model, 3)
    for rank in on_ranks(ranks):
        found, weights, states = rank["adapters"][stage]
        assert_same_curves(found, expected)
        assert_same_weights(weights, model)
        assert states == {name for name in before if scenarios.is_adapter(name)}
        assert all(torch.equal(weights[name], tensor) for name, tensor in before.items() if name not in states)


@pytest.mark.parametrize(("ranks", "stage"), EVERY)
def test_a_gradient_depends_on_neither_micro_batches_nor_ranks(on_ranks, ranks, stage):
    expected = plain.gradient(tiny.reference(), 0)
    for rank in on_ranks(ranks):
        for accumulation in (1, 8 // ranks):
            found = rank["micro_batches"][stage, accumulation]
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_replicas_may_reach_different_parameters(on_ranks):
    gradients, weights = zip(*(rank["one_sided"] for rank in on_ranks(2)), strict=True)
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.full((3, 5), 3.0))
    assert torch.equal(weights[0]["spare"], weights[1]["spare"])
    assert (weights[0]["spare"] < 1).all()
