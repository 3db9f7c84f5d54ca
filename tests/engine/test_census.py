"""What is counted in an update is what plain torch has in its gradients and weights, on every stage and tier."""

import pytest
import torch

from rlhf.engine.adam_kernel import Piece
from rlhf.engine.census import Census
from rlhf.engine.loss_scale import LossScale
from rlhf.tracking.histogram import count, histogram
from tests.engine import plain, tiny

EVERY = [(ranks, *key) for ranks in (1, 2) for key in ((0, "device"), (1, "cpu"), (3, "device"), (3, "nvme"))]


@pytest.fixture(scope="module")
def expected():
    """Gradients before clipping and weights before the update of the second step."""
    model = tiny.reference()
    plain.train(model, 1)
    model.zero_grad()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {
        f"{family}/{name}": tensor
        for family, tensors in (("gradients", plain.gradient(model, 1)), ("weights", weights))
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(("ranks", "stage", "tier"), EVERY)
def test_gradients_and_weights_are_counted_once_and_before_clipping(on_ranks, expected, ranks, stage, tier):
    for rank in on_ranks(ranks):
        found, after_a_skip = rank["observed"][stage, tier]
        assert after_a_skip == {}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            theirs = histogram(count(tensor))
            ours = dict(zip(found[name].edges, found[name].counts, strict=False))
            assert sum(ours.values()) == tensor.numel(), name
            moved = sum(abs(ours.get(edge, 0) - n) for edge, n in zip(theirs.edges, theirs.counts, strict=False))
            assert moved <= 2 + tensor.numel() // 100, name  # the last bits put a few numbers on the other side
            assert torch.tensor(theirs.counts).sum() == tensor.numel()


def test_gradients_are_counted_without_the_loss_scale_of_their_own_step():
    scale = LossScale(8.0)
    census = Census(["w"], loss_scale=scale, left_out=())
    for scale.value, gradient in ((8.0, 24.0), (2.0, 6.0)):  # both stand for 3
        rows = [torch.full((1,), number) for number in (1.0, gradient, 0.0, 0.0)]
        census.note(Piece("w", 0, True, torch.zeros(()), *rows))
    found = census.over_ranks()
    assert (found["gradients/w"].counts, found["gradients/w"].edges) == ([2], [2.0, 4.0])
    assert (found["weights/w"].counts, found["weights/w"].edges) == ([2], [1.0, 2.0])
