"""AdamW by hand, and a state that lives elsewhere."""

import copy

import pytest
import torch
from torch import nn

from rlhf.config import OptimizerConfig
from rlhf.engine.optimizers import AdamState, AdamW

# Adam's first step moves every weight by lr against the sign of its gradient; decay takes lr * 0.1 of the weight first.
CONFIG = OptimizerConfig(lr=1.0, weight_decay=0.1, eps=0.0, betas=[0.9, 0.99])


def matrix_and_vector():
    return {"matrix": nn.Parameter(torch.tensor([[2.0, -4.0]])), "vector": nn.Parameter(torch.tensor([2.0, -4.0]))}


def test_the_first_step_by_hand_decays_matrices_only():
    group = matrix_and_vector()
    gradients = {"matrix": torch.tensor([[0.5, -3.0]]), "vector": torch.tensor([0.5, -3.0])}
    AdamW([group], {}, config=CONFIG).step(gradients, lr=0.1)
    torch.testing.assert_close(group["matrix"].data, torch.tensor([[2 * 0.99 - 0.1, -4 * 0.99 + 0.1]]))
    torch.testing.assert_close(group["vector"].data, torch.tensor([1.9, -3.9]))


def test_moments_and_bias_correction_by_hand_over_two_steps():
    group = {"vector": nn.Parameter(torch.tensor([1.0]))}
    adam = AdamW([group], {}, config=CONFIG)
    adam.step({"vector": torch.tensor([1.0])}, lr=0.1)
    adam.step({"vector": torch.tensor([3.0])}, lr=0.1)
    state = adam.state_dict()["vector"]
    assert state["step"] == 2
    assert state["exp_avg"].item() == pytest.approx(0.9 * 0.1 + 0.1 * 3)  # 0.39
    assert state["exp_avg_sq"].item() == pytest.approx(0.99 * 0.01 + 0.01 * 9)  # 0.0999
    second = (0.39 / 0.19) / (0.0999 / 0.0199) ** 0.5
    assert group["vector"].item() == pytest.approx(1 - 0.1 - 0.1 * second)


def test_the_scale_multiplies_the_gradient():
    group = {"vector": nn.Parameter(torch.tensor([1.0]))}
    adam = AdamW([group], {}, config=CONFIG)
    adam.step({"vector": torch.tensor([8.0])}, lr=0.1, scale=0.25)
    assert adam.state_dict()["vector"]["exp_avg"].item() == pytest.approx(0.2)


def test_a_parameter_without_gradient_is_left_alone_and_keeps_its_count():
    group = matrix_and_vector()
    adam = AdamW([group], {}, config=CONFIG)
    adam.step({"vector": torch.ones(2)}, lr=0.1)
    assert torch.equal(group["matrix"].data, torch.tensor([[2.0, -4.0]]))
    assert [entry["step"].item() for entry in adam.state_dict().values()] == [0, 1]


def test_small_updates_add_up_in_the_masters_and_only_then_reach_bf16():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    adam = AdamW([{"weight": weight}], {"weight": torch.ones(1)}, config=CONFIG)
    seen = []
    for _ in range(4):  # bf16 is spaced by 2^-8 below 1, and rounds at half of that: 0.00195
        adam.step({"weight": torch.ones(1)}, lr=0.001)
        seen.append(weight.item())
    assert seen == [1.0, 1 - 2**-8, 1 - 2**-8, 1 - 2**-8]
    assert adam.masters()["weight"].item() == pytest.approx(0.996, abs=1e-6)


class Elsewhere:
    """A home that keeps a copy of its own, as one on another device would, and writes down the visits."""

    def __init__(self, state: AdamState, name: str, visits: list) -> None:
        self.kept, self.name, self.visits = copy.deepcopy(state), name, visits

    def load(self):
        self.visits.append(("load", self.name))
        return copy.deepcopy(self.kept)

    def store(self, state):
        self.visits.append(("store", self.name))
        self.kept = copy.deepcopy(state)


def test_a_state_that_lives_elsewhere_gives_the_same_weights_and_is_visited_once_a_group_and_step():
    resident = [{"first": nn.Parameter(torch.ones(2, 2))}, {"second": nn.Parameter(torch.ones(3))}]
    remote = copy.deepcopy(resident)
    here = AdamW(resident, {}, config=CONFIG)
    there = AdamW(remote, {}, config=CONFIG)
    visits = []
    there.homes = [
        Elsewhere(home.load(), name, visits) for home, name in zip(there.homes, ("first", "second"), strict=True)
    ]
    for step in range(3):
        gradients = {"first": torch.full((2, 2), 1.0 + step), "second": torch.full((3,), 1.0 - step)}
        here.step(gradients, lr=0.1)
        there.step({name: gradient.clone() for name, gradient in gradients.items()}, lr=0.1)
    for ours, theirs in zip(resident, remote, strict=True):
        assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
    assert visits == [("load", "first"), ("store", "first"), ("load", "second"), ("store", "second")] * 3
