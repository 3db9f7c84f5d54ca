"""Direct preference optimisation: losses of pairs of responses, given their log-probabilities under two models.

The implicit reward of a response is beta * log(p_policy / p_reference), and `h` is how much the chosen response has of
it above the rejected one (Rafailov et al. 2023, arXiv:2305.18290). Left out: other divergences than reverse KL.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rlhf.algorithms.masked import at_least_fp32, divide_by_count


class DPOForm(NamedTuple):
    """The shape of the loss of a pair."""

    beta: float
    """How much a deviation from the reference costs; for IPO its tau."""
    kind: str = "sigmoid"
    """A key of the table in `pair_losses`."""
    label_smoothing: float = 0.0
    """Assumed share of pairs whose label is the wrong way round; for sigmoid and robust."""
    normalize_length: bool = False
    """Average log-ratios over the tokens of a response instead of summing them; IPO always does."""
    nll_coef: float = 0.0
    """Weight of the chosen response's negative log-likelihood per token (Pang et al. 2024, arXiv:2404.19733, eq. 1)."""

    @property
    def averages(self) -> bool:
        """Whether log-ratios are means over tokens."""
        return self.normalize_length or self.kind == "ipo"


class DPOLoss(NamedTuple):
    """The loss and, detached, diagnostics; all of them add up over micro-batches given a global denominator."""

    loss: Tensor  # scalar
    accuracy: Tensor  # scalar, share of pairs whose chosen response has the strictly larger reward; a tie is an error
    margin: Tensor  # scalar, mean of chosen - rejected reward
    reward_chosen: Tensor  # scalar, mean implicit reward of the chosen responses
    reward_rejected: Tensor  # scalar, the same of the rejected ones
    log_ratio: Tensor  # scalar, mean of log(p_policy / p_reference) over both responses, in nats


def pair_losses(log_odds: Tensor, form: DPOForm) -> Tensor:
    """The loss of each pair, `[B]`, of any form but its likelihood term.

    * sigmoid: -log sigmoid(h) (DPO, eq. 7); smoothed, (1 - e) * that - e * log sigmoid(-h) (Mitchell 2023, "cDPO").
    * robust: the same with e counted negatively, over 1 - 2e: unbiased if a share e of the labels is wrong (Ray
      Chowdhury et al. 2024, arXiv:2403.00409).
    * hinge: max(0, 1 - h) (Zhao et al. 2023, "SLiC", arXiv:2305.10425).
    * ipo: (h / beta - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    Args:
        log_odds: `[B]`, log(p_policy / p_reference) of the chosen response minus that of the rejected one.
        form: the shape of the loss.
    """
    h, wrong = form.beta * log_odds, form.label_smoothing
    if form.kind == "hinge":
        return relu(1 - h)
    if form.kind == "ipo":
        return (log_odds - 1 / (2 * form.beta)).square()
    right_way, wrong_way = -logsigmoid(h), -logsigmoid(-h)
    if form.kind == "robust":
        return ((1 - wrong) * right_way - wrong * wrong_way) / (1 - 2 * wrong)
    assert form.kind == "sigmoid", form.kind
    return (1 - wrong) * right_way + wrong * wrong_way


def dpo_loss(
    policy_logprobs: Tensor,
    reference_logprobs: Tensor,
    lengths: Tensor,
    *,
    form: DPOForm,
    denominator: Tensor | float | None = None,
) -> DPOLoss:
    """The mean loss of B pairs, computed in at least fp32.

    Args:
        policy_logprobs: `[2B]`, log-probability of each whole response: the chosen ones, then the rejected in the same
            order.
        reference_logprobs: `[2B]`, the same under the reference; no gradient flows there.
        lengths: `[2B]`, tokens of each response.
        form: the shape of the loss.
        denominator: pairs to divide by, the global count where batches are cut; B if None.

    Raises:
        ValueError: if the shapes differ.
    """
    if not policy_logprobs.shape == reference_logprobs.shape == lengths.shape or len(lengths) % 2:
        found = [tuple(tensor.shape) for tensor in (policy_logprobs, reference_logprobs, lengths)]
        raise ValueError(f"found log-probabilities and lengths of shapes {found}, expected [2B] for all three")
    logprobs, lengths = at_least_fp32(policy_logprobs), lengths.clamp(min=1)
    ratios = logprobs - at_least_fp32(reference_logprobs.detach())  # [2B] in nats
    chosen, rejected = (ratios / lengths if form.averages else ratios).chunk(2)  # [2B] -> [B] twice
    losses = pair_losses(chosen - rejected, form)
    if form.nll_coef:
        losses = losses - form.nll_coef * (logprobs / lengths).chunk(2)[0]
    count = losses.numel() if denominator is None else denominator
    rewards = form.beta * torch.stack([chosen, rejected]).detach()  # [2, B]
    return DPOLoss(
        loss=divide_by_count(losses.sum(), count),
        accuracy=divide_by_count((rewards[0] > rewards[1]).to(losses.dtype).sum(), count),
        margin=divide_by_count((rewards[0] - rewards[1]).sum(), count),
        reward_chosen=divide_by_count(rewards[0].sum(), count),
        reward_rejected=divide_by_count(rewards[1].sum(), count),
        log_ratio=divide_by_count(ratios.detach().sum() / 2, count),
    )
