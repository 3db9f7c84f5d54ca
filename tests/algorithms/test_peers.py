"""Losses, their gradients and advantages, beside the values that TRL and verl give for the same numbers.

`tests/golden/policy_losses.json` says which version and which call gave each of them.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from rlhf.algorithms.groups import group_advantages
from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.loss_weights import aggregation_weights, mismatch_weights
from rlhf.algorithms.masked import masked_whiten, weighted_sum
from rlhf.algorithms.ppo import Surrogate, gae, policy_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/policy_losses.json").read_text())
INPUTS = GOLDEN["inputs"]
MASK = torch.arange(5) < tensor(INPUTS["lengths"])[:, None]
OLD, GENERATED, REFERENCE = (tensor(INPUTS[f"{name}_logprobs"]) for name in ("old", "generation", "reference"))
AGGREGATION = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum-norm": "constant",
}
CASES = GOLDEN["losses"]


def name_of(case):
    return "-".join(str(value) for key, value in case.items() if key not in ("gradient", "loss", "clip_fraction"))


def found_for(case):
    """Our settings for a peer's call, and what they give: the loss, its gradient, and the share of clipped tokens."""
    loss_type = case.get("loss_type", case["call"])
    kind = "cispo" if "cispo" in loss_type else "clip"
    is_sequence = case.get("level") == "sequence" or "gspo" in loss_type
    surrogate = Surrogate(
        tuple(case["clip"]), kind=kind, ratio="sequence" if is_sequence else "token", dual_clip=case.get("dual")
    )
    advantages = tensor(INPUTS[case.get("advantages", "advantages")])
    advantages = advantages[:, None].expand(6, 5) if advantages.dim() == 1 else advantages
    mean = AGGREGATION.get(case["aggregation"], case["aggregation"])
    weights = aggregation_weights(MASK, kind=mean, length=INPUTS["length"])
    correction = case.get("correction") or ("token_truncate" if case.get("token_truncate") else None)
    bounds = case.get("bounds") or (0.0, case.get("token_truncate"))
    factors = weights
    if correction:
        factors = weights * mismatch_weights(OLD, GENERATED, MASK, kind=correction, bounds=tuple(bounds))
    logprobs = tensor(INPUTS["logprobs"], requires_grad=True)
    result = policy_loss(logprobs, OLD, advantages, MASK, surrogate=surrogate, weights=factors)
    loss = result.loss
    if case.get("beta"):
        loss = loss + case["beta"] * weighted_sum(kl_estimate(logprobs, REFERENCE, kind="k3"), MASK, weights=weights)
    loss.backward()
    return loss.detach(), logprobs.grad, result.clip_fraction


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_losses_and_gradients_are_those_of_the_peers(case):
    loss, gradient, clipped = found_for(case)
    assert_close(loss, tensor(case["loss"]), rtol=2e-6, atol=2e-7)
    assert_close(gradient, tensor(case["gradient"]), rtol=1e-5, atol=2e-7)
    if "clip_fraction" in case:
        assert_close(clipped, tensor(case["clip_fraction"]))


def test_the_peers_were_asked_about_every_kind():
    assert {case["peer"] for case in CASES} == {"trl", "verl"}
    assert len(CASES) > 70
    assert len({round(case["loss"], 6) for case in CASES}) > 50  # they differ, so a setting without effect would show


@pytest.mark.parametrize("case", GOLDEN["group_advantages"], ids=lambda case: f"{case['peer']}-{case['call']}")
def test_group_advantages_are_those_of_the_peers(case):
    scores, groups = tensor(GOLDEN["group_scores"]), torch.arange(12) // 4
    found = group_advantages(scores, groups=groups, baseline=case["baseline"], scale=case["scale"], eps=case["eps"])
    assert_close(found, tensor(case["advantages"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", GOLDEN["reinforce_pp"][:2], ids=lambda case: f"gamma {case['gamma']}")
def test_returns_of_reinforce_pp_are_those_of_verl(case):
    rewards = tensor(INPUTS["token_advantages"]) * MASK
    returns = gae(rewards, torch.zeros(6, 5), MASK, gamma=case["gamma"], lam=1.0).advantages
    assert_close(returns, tensor(case["returns"]) * MASK, rtol=1e-5, atol=1e-6)
    # verl divides the variance by n - 1, we by n.
    count = int(MASK.sum())
    expected = tensor(case["advantages"]) * (count / (count - 1)) ** 0.5
    assert_close(masked_whiten(returns, MASK), expected, rtol=1e-5, atol=1e-5)


def test_whitened_group_advantages_are_reinforce_pp_with_a_baseline():
    case = GOLDEN["reinforce_pp"][2]
    totals = (tensor(INPUTS["token_advantages"]) * MASK).sum(-1)
    per_row = group_advantages(totals, groups=tensor(case["groups"]), baseline="mean", eps=0.0)
    count = int(MASK.sum())
    expected = tensor(case["advantages"]) * (count / (count - 1)) ** 0.5
    assert_close(masked_whiten(per_row[:, None] * MASK, MASK), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", GOLDEN["kl"], ids=lambda case: case["kind"])
def test_kl_estimates_and_their_bounds_are_those_of_verl(case):
    ours = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}[case["kind"]]
    logprobs = tensor(case.get("logprobs", INPUTS["logprobs"]))
    reference = tensor(case["reference_logprobs"]) if "logprobs" in case else REFERENCE
    assert_close(kl_estimate(logprobs, reference, kind=ours), tensor(case["values"]), rtol=1e-5, atol=1e-6)
