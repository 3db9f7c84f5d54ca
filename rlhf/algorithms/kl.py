"""KL divergence of the actor from the reference, and the coefficient of its penalty.

Estimators of KL(actor || reference) from the log-probabilities of tokens that the actor sampled (J. Schulman,
"Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html), and the two controllers of the
coefficient. Left out: the KL over the whole vocabulary, which needs both models' logits at once.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlhf.algorithms.masked import at_least_fp32

KL_BOUND = 10.0
"""Largest k2 or k3 estimate of a token, as in verl and OpenRLHF."""
_MAX_EXPONENT = 20.0  # its exponential is far beyond the bound already, and does not overflow
_MAX_ERROR = 0.2


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, *, kind: str) -> Tensor:
    """Estimate KL(actor || reference) at each token, `[B, R]` in at least fp32, with p the actor and q the reference.

    * "k1": `log p - log q`. Unbiased, negative for about every other token.
    * "k2": `(log p - log q)^2 / 2`. Biased but never negative; the only one whose *gradient* is, in expectation, that
      of the KL.
    * "k3": `q/p - 1 - log(q/p)`. Unbiased and never negative.

    k2 and k3 are cut at `KL_BOUND`, with gradient 0 beyond it: k3 grows with q/p itself, so a single token that the
    actor finds e^20 times less likely than the reference would outweigh the whole batch. `clamped` counts such tokens.

    Args:
        logprobs: `[B, R]` under the actor, which sampled the tokens.
        reference_logprobs: `[B, R]` under the reference.
        kind: "k1", "k2" or "k3".
    """
    log_ratio = at_least_fp32(logprobs) - at_least_fp32(reference_logprobs)  # log p - log q
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return (log_ratio.square() / 2).clamp(max=KL_BOUND)
    if kind == "k3":
        inverse = (-log_ratio).clamp(max=_MAX_EXPONENT)  # log q - log p
        return (torch.expm1(inverse) - inverse).clamp(max=KL_BOUND)
    raise ValueError(f'found KL estimator "{kind}", expected "k1", "k2" or "k3"')


def clamped(estimate: Tensor, *, kind: str) -> Tensor:
    """True where `kl_estimate` has cut an estimate of this kind at its bound, `[B, R]` bool; k1 is never cut.

    Args:
        estimate: `[B, R]`, from `kl_estimate`.
        kind: "k1", "k2" or "k3".
    """
    return estimate >= (math.inf if kind == "k1" else KL_BOUND)


class KLController(Protocol):
    """Keeps the coefficient of the KL in the reward, between rollouts and across restarts."""

    value: float

    def update(self, kl_per_sequence: float, num_sequences: int) -> None:
        """Update after a rollout with the KL summed over tokens, averaged over its `num_sequences` sequences."""

    def state_dict(self) -> dict[str, float]:
        """State for a checkpoint."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a `state_dict`."""


@dataclass
class FixedKL:
    """A constant coefficient."""

    value: float

    def update(self, kl_per_sequence: float, num_sequences: int) -> None:
        """Does nothing: the coefficient is constant."""

    def state_dict(self) -> dict[str, float]:
        """State for a checkpoint."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a `state_dict`."""
        self.value = state["value"]


@dataclass
class AdaptiveKL:
    """A coefficient that steers the KL towards a target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    Attributes:
        value: the coefficient now; positive.
        target: the wanted KL in nats per *sequence*: summed over tokens, averaged over sequences. The paper's 6.0 is
            of this kind; fed with a mean per token, as some codebases do, the controller only ever lowers `value`.
        horizon: the number of sequences over which a clipped error of 0.2 changes `value` by about a fifth.
    """

    value: float
    _: KW_ONLY
    target: float
    horizon: float

    def __post_init__(self) -> None:
        for name, number in (("coef", self.value), ("target", self.target), ("horizon", self.horizon)):
            if not number > 0:
                raise ValueError(f"found ppo.kl.{name}={number} for an adaptive KL, expected a positive number")

    def update(self, kl_per_sequence: float, num_sequences: int) -> None:
        """Adapt the coefficient after one rollout.

        Args:
            kl_per_sequence: KL in nats, summed over tokens and averaged over the rollout of all ranks.
            num_sequences: sequences in that rollout, over all ranks.

        Raises:
            ValueError: if the KL is not finite, or the rollout so large for the horizon that `value` would not stay
                positive.
        """
        if not math.isfinite(kl_per_sequence):
            raise ValueError(f"found a KL of {kl_per_sequence} per sequence, expected a finite number")
        error = max(-_MAX_ERROR, min(kl_per_sequence / self.target - 1, _MAX_ERROR))  # clip((KL - target) / target)
        factor = 1 + error * num_sequences / self.horizon  # beta_{t+1} = beta_t (1 + K e_t), K = n / horizon
        if factor <= 0:
            raise ValueError(
                f"found ppo.kl.horizon={self.horizon} for rollouts of {num_sequences} sequences, with which one update "
                f"turns the KL penalty off or around; expected a horizon above {_MAX_ERROR * num_sequences:g}"
            )
        self.value *= factor

    def state_dict(self) -> dict[str, float]:
        """State for a checkpoint; target and horizon belong to the configuration."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a `state_dict`."""
        self.value = state["value"]
