import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from rlhf.algorithms.kl import AdaptiveKL, FixedKL, clamped, kl_estimate
from rlhf.algorithms.masked import masked_whiten
from rlhf.algorithms.ppo import gae, token_rewards

LOG2 = math.log(2)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", LOG2),  # log 1/2 - log 1/4
        ("k2", LOG2**2 / 2),
        ("k3", LOG2 - 0.5),  # q/p - 1 - log q/p = 1/2 - 1 + log 2
    ],
)
def test_estimators_by_hand(kind, expected):
    estimate = kl_estimate(tensor([[0.5]]).log(), tensor([[0.25]]).log(), kind=kind)
    assert_close(estimate, tensor([[expected]]))


def random_distributions():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 50, dtype=torch.float64, generator=generator).log_softmax(-1).unbind()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind):
    p, q = (x.div(2).log_softmax(-1) for x in random_distributions())  # near enough for no estimate to be cut
    exact = (p.exp() * (p - q)).sum()
    assert_close((p.exp() * kl_estimate(p, q, kind=kind)).sum(), exact)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_k2_and_k3_are_never_negative(kind):
    p, q = random_distributions()
    assert kl_estimate(p, q, kind=kind).min() >= 0
    assert kl_estimate(p, p, kind=kind).abs().max() == 0


def test_the_expected_gradient_of_k2_is_that_of_the_kl():
    logits, q = random_distributions()
    logits.requires_grad_()
    p = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    sampled = (p.exp().detach() * kl_estimate(p, q, kind="k2")).sum()
    assert_close(torch.autograd.grad(sampled, logits)[0], exact)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_token_that_the_reference_finds_far_likelier_gives_no_inf(kind):
    logprobs = tensor([[-200.0]], requires_grad=True)
    estimate = kl_estimate(logprobs, tensor([[0.0]]), kind=kind)
    estimate.sum().backward()
    assert estimate.isfinite().all()
    assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "log_ratio", "expected"),
    [
        ("k1", 19.9, 19.9),
        ("k1", -19.9, -19.9),
        ("k2", 4.0, 8.0),  # 16 / 2
        ("k2", -5.0, 10.0),  # 12.5, cut
        ("k3", -2.0, math.exp(2) - 3),  # q/p = e^2: e^2 - 1 - 2
        ("k3", -19.9, 10.0),  # e^19.9 = 4e8, cut
        ("k3", 9.0, 8 + math.exp(-9)),  # q/p = e^-9: e^-9 - 1 + 9
        ("k3", 100.0, 10.0),
    ],
)
def test_k2_and_k3_are_cut_at_10_and_have_no_gradient_there(kind, log_ratio, expected):
    logprobs = tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
    estimate = kl_estimate(logprobs, tensor([[0.0]]), kind=kind)
    estimate.sum().backward()
    assert estimate.item() == pytest.approx(expected, rel=1e-12)
    is_cut = expected == 10
    assert clamped(estimate, kind=kind).item() is is_cut
    assert (logprobs.grad.item() == 0) is is_cut


def test_one_token_far_from_the_reference_leaves_the_other_rows_their_differences():
    logprobs, scores = torch.zeros(4, 3), tensor([1.0, -1.0, 1.0, -1.0])
    logprobs[3, 1] = -19.9
    mask = torch.ones(4, 3, dtype=torch.bool)
    rewards = token_rewards(scores, kl_estimate(logprobs, torch.zeros(4, 3), kind="k3"), mask, kl_coef=0.05)
    advantages = masked_whiten(gae(rewards, torch.zeros(4, 3), mask, gamma=1.0, lam=0.95).advantages, mask)
    # By hand: the rewards of rows 0 and 1 differ by 2, and 0.05 * 10 is the most that one token can cost.
    assert advantages[0, 2] - advantages[1, 2] > 1.5


def test_bf16_is_subtracted_in_fp32():
    # 1.0078125 is one bf16 step above 1: its square / 2 needs more digits than bf16 has.
    p, q = tensor([[1.0078125]], dtype=torch.bfloat16), tensor([[1.0]], dtype=torch.bfloat16)
    assert kl_estimate(p, q, kind="k2").item() == 0.0078125**2 / 2


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match='found KL estimator "k4"'):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), kind="k4")


def test_a_fixed_coefficient_stays():
    controller = FixedKL(0.05)
    controller.update(100.0, 512)
    assert controller.value == 0.05


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (9.0, 0.1 * 1.00512),  # error 0.5, clipped to 0.2: 1 + 0.2 * 256 / 10000
        (6.3, 0.1 * 1.00128),  # error 0.05: 1 + 0.05 * 256 / 10000
        (6.0, 0.1),
        (5.4, 0.1 * 0.99744),  # error -0.1: 1 - 0.1 * 256 / 10000
        (0.0, 0.1 * 0.99488),  # error -1, clipped to -0.2
        (-3.0, 0.1 * 0.99488),
    ],
)
def test_the_adaptive_coefficient_by_hand(kl, expected):
    controller = AdaptiveKL(0.1, target=6.0, horizon=10_000)
    controller.update(kl, 256)
    assert controller.value == pytest.approx(expected, rel=1e-12)


def test_updates_compound():
    controller = AdaptiveKL(value=0.1, target=6.0, horizon=10_000)
    controller.update(60.0, 1000)
    controller.update(60.0, 1000)
    assert controller.value == pytest.approx(0.1 * 1.02 * 1.02, rel=1e-12)


@pytest.mark.parametrize("make", [FixedKL, lambda value: AdaptiveKL(value, target=6.0, horizon=100)])
def test_a_restarted_controller_goes_on_where_it_was(make):
    controller, restarted = make(0.1), make(0.3)
    controller.update(9.0, 10)
    restarted.load_state_dict(controller.state_dict())
    controller.update(2.0, 10)
    restarted.update(2.0, 10)
    assert restarted.value == controller.value


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_is_refused(kl):
    controller = AdaptiveKL(0.1, target=6.0, horizon=100)
    with pytest.raises(ValueError, match=f"found a KL of {kl}"):
        controller.update(kl, 10)
    assert controller.value == 0.1


def test_a_rollout_too_large_for_the_horizon_is_refused():
    with pytest.raises(ValueError, match="ppo.kl.horizon=100 for rollouts of 500.*above 100"):
        AdaptiveKL(0.1, target=6.0, horizon=100).update(0.0, 500)


@pytest.mark.parametrize(
    ("name", "change"), [("coef", {"value": 0}), ("target", {"target": 0}), ("horizon", {"horizon": -1})]
)
def test_settings_that_cannot_steer_are_refused(name, change):
    with pytest.raises(ValueError, match=rf"found ppo.kl.{name}="):
        AdaptiveKL(**({"value": 0.1, "target": 6.0, "horizon": 100} | change))
