"""DPO's losses: worked by hand, beside TRL's values and gradients; `tests/golden/dpo_losses.json` names the call."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from rlhf.algorithms.dpo import DPOForm, dpo_loss, pair_losses

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/dpo_losses.json").read_text())
TOKENS, REFERENCE = tensor(GOLDEN["logprobs"]), tensor(GOLDEN["reference_logprobs"])  # [2, B, R] and [2, B]
LENGTHS = tensor(GOLDEN["lengths"])  # [2, B]
KINDS = ("sigmoid", "robust", "hinge", "ipo")


def name_of(case):
    return f"{'+'.join(case['loss_type'])}-{case['beta']}-{case['label_smoothing']}-{len(case['pairs'])}"


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=name_of)
def test_losses_gradients_and_rewards_are_those_of_trl(case):
    pairs = tensor(case["pairs"])
    logprobs = TOKENS[:, pairs].sum(-1).flatten().requires_grad_()
    reference, lengths = REFERENCE[:, pairs].flatten(), LENGTHS[:, pairs].flatten()
    form = DPOForm(**case["form"])
    result = dpo_loss(logprobs, reference, lengths, form=form)
    result.loss.backward()
    assert_close(result.loss.item(), case["loss"], rtol=1e-5, atol=1e-6)
    assert_close(logprobs.grad.view(2, -1), tensor(case["gradient"]), rtol=1e-5, atol=1e-6)
    if not form.averages:  # TRL's rewards are those of sums, whatever the loss
        found = {"chosen": result.reward_chosen, "rejected": result.reward_rejected, "margins": result.margin}
        found["accuracies"] = result.accuracy
        for name, value in found.items():
            assert_close(value.item(), case["metrics"][f"rewards/{name}"], rtol=1e-5, atol=1e-6)


def test_a_pair_by_hand():
    # log-ratios: chosen -2 - (-3) = 1, rejected -4 - (-2) = -2; h = 0.5 * (1 - (-2)) = 1.5
    arguments = tensor([-2.0, -4.0]), tensor([-3.0, -2.0]), tensor([4, 2])
    result = dpo_loss(*arguments, form=DPOForm(0.5))
    assert result.loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert (result.reward_chosen.item(), result.reward_rejected.item()) == (0.5, -1.0)
    assert (result.margin.item(), result.accuracy.item(), result.log_ratio.item()) == (1.5, 1.0, -0.5)
    # averaged over 4 and 2 tokens: 1 / 4 - (-2 / 2) = 1.25
    ipo = dpo_loss(*arguments, form=DPOForm(0.5, "ipo"))
    assert ipo.loss.item() == pytest.approx((1.25 - 1) ** 2)
    assert dpo_loss(*arguments, form=DPOForm(0.4, "hinge")).loss.item() == 0  # 0.4 * 3 is above 1
    assert dpo_loss(*arguments, form=DPOForm(0.2, "hinge")).loss.item() == pytest.approx(0.4)
    # the chosen response has -2 / 4 nats per token
    with_nll = dpo_loss(*arguments, form=DPOForm(0.5, nll_coef=0.1))
    assert (with_nll.loss - result.loss).item() == pytest.approx(0.05)


@pytest.mark.parametrize("kind", ["sigmoid", "robust"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_policy_that_is_its_reference_starts_at_ln_2(kind, smoothing):
    logprobs = -10 * torch.rand(6)
    result = dpo_loss(logprobs, logprobs, torch.ones(6), form=DPOForm(0.3, kind, smoothing))
    assert result.loss.item() == pytest.approx(math.log(2))
    assert result.accuracy == result.margin == result.log_ratio == 0  # a tie is not right


def test_the_robust_loss_is_unbiased_where_that_share_of_labels_is_wrong():
    log_odds, wrong = torch.linspace(-3, 3, 7), 0.3
    robust, plain = DPOForm(0.8, "robust", wrong), DPOForm(0.8)
    expected = (1 - wrong) * pair_losses(log_odds, robust) + wrong * pair_losses(-log_odds, robust)
    assert_close(expected, pair_losses(log_odds, plain))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_add_up_to_it(kind):
    policy, reference, lengths = -9 * torch.rand(2, 6), -9 * torch.rand(2, 6), torch.randint(1, 9, (2, 6))
    form = DPOForm(0.2, kind, nll_coef=0.3)
    whole = dpo_loss(*(x.flatten() for x in (policy, reference, lengths)), form=form)
    parts = [
        dpo_loss(*(x[:, rows].flatten() for x in (policy, reference, lengths)), form=form, denominator=6)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    for name, value in whole._asdict().items():
        assert_close(sum(getattr(part, name) for part in parts), value)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind):
    policy = (-9 * torch.rand(6, dtype=torch.float64)).requires_grad_()
    reference, lengths = -9 * torch.rand(6, dtype=torch.float64), torch.randint(1, 9, (6,))
    smoothing = 0.1 if kind in ("sigmoid", "robust") else 0.0
    form = DPOForm(0.13, kind, smoothing, normalize_length=True, nll_coef=0.2)
    assert torch.autograd.gradcheck(lambda x: dpo_loss(x, reference, lengths, form=form).loss, policy)


def test_what_does_not_belong_together_is_refused():
    for shapes in ((4, 4, 2), (3, 3, 3)):
        with pytest.raises(ValueError, match=r"expected \[2B\] for all three"):
            dpo_loss(*(torch.ones(size) for size in shapes), form=DPOForm(0.1))
