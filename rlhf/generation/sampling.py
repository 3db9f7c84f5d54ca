"""Draws tokens from logits, with random numbers that belong to the sample and not to the batch.

Left out: repetition penalties, beams, and everything else that would draw from a distribution that the training path
cannot compute.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 256  # tokens whose weights are summed before the search, which then reads one block only
_PIECE = 3 << 18  # weights at once on a CPU, 3 MiB: `return_freed_memory` makes more of them anew in every step
_FEW = 1024  # the most likely tokens that top-p looks at before it sorts more of the vocabulary


class Drawn(NamedTuple):
    """One token of each row."""

    tokens: Tensor  # [B] int64
    logprobs: Tensor  # [B] fp32, under softmax(logits / temperature) over the whole vocabulary


class _Hit(NamedTuple):
    interval: Tensor  # [B] int64, the interval that the uniform falls into
    rest: Tensor  # [B] fp64 in [0, 1), where in it


def sample(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    is_static: bool = False,
) -> Drawn:
    """Draw by inverting the cumulative distribution, many times faster on a CPU than `torch.multinomial`.

    The log-probability is taken at this temperature before `top_k` and `top_p` cut the distribution, since that is what
    training recomputes.

    Args:
        logits: `[B, V]` of any floating type; exponentials are computed in fp32 and summed in fp64.
        uniforms: `[B]` in [0, 1), one draw each.
        temperature: Divides the logits; 0 takes the most likely token and reports its log-probability at 1.
        top_k: Draw from this many most likely tokens; 0 from all.
        top_p: After `top_k`, draw from the smallest set with this share of the probability (Holtzman et al. 2020).
        is_static: No shape depends on the logits: `top_p` sorts the whole vocabulary.

    Returns:
        Tokens and log-probabilities, `[B]`.
    """
    vocabulary = logits.shape[-1]
    at_once = max(_PIECE // vocabulary, 1)
    if logits.device.type == "cpu" and len(logits) > at_once:
        piece = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, is_static=is_static)
        drawn = map(piece, torch.split(logits, at_once), torch.split(uniforms, at_once))
        return Drawn(*map(torch.cat, zip(*drawn, strict=True)))
    highest = logits.amax(-1, keepdim=True).float()
    weights = _weights(logits, highest, temperature=temperature or 1.0)
    totals = weights.sum(-1)  # [B, blocks]
    if temperature == 0:
        tokens = logits.max(-1).indices  # the first of equal ones; `argmax` takes five times as long for bf16 on a CPU
    elif 0 < top_k < vocabulary or top_p < 1:
        tokens = _draw_from_top(
            weights.flatten(1)[:, :vocabulary], uniforms, top_k=top_k, top_p=top_p, is_static=is_static
        )
    else:
        tokens = _draw(weights, uniforms, totals=totals).clamp(max=vocabulary - 1)
    chosen = (logits.gather(-1, tokens[:, None]).float() - highest).squeeze(-1) / (temperature or 1.0)
    return Drawn(tokens, chosen - totals.sum(-1, dtype=torch.float64).log().float())


def uniforms(seed: int, sample_ids: Tensor, *, length: int) -> Tensor:
    """Random numbers in [0, 1) that depend on the seed, the sample and the position alone.

    A counter goes through SplitMix64's finaliser (Steele, Lea and Flood 2014) once for each of the three, so a sample
    is drawn alike in any batch, on any rank and on any device.

    Args:
        seed: Seed of the run and the iteration.
        sample_ids: `[B]` int64, unique.
        length: R, response positions.

    Returns:
        `[B, R]` fp32, multiples of 2**-24.
    """
    positions = torch.arange(length, device=sample_ids.device)
    return (_mix(sample_keys(seed, sample_ids)[:, None] ^ positions) >> 40 & 0xFFFFFF).float() / 2**24


def sample_keys(seed: int, sample_ids: Tensor) -> Tensor:
    """A random int64 for each of `sample_ids` `[B]`, from which its random numbers follow."""
    return _mix(_mix(torch.tensor(_signed(seed), device=sample_ids.device)) ^ sample_ids)


def _weights(logits: Tensor, highest: Tensor, *, temperature: float) -> Tensor:
    """Unnormalised probabilities `[B, blocks, 256]`, at most 1; 0 beyond the vocabulary.

    Everything happens in one buffer: on a CPU, fresh memory of this size costs more than the arithmetic.
    """
    batch, vocabulary = logits.shape
    weights = logits.new_zeros(batch, -(-vocabulary // _BLOCK), _BLOCK, dtype=torch.float32)
    inside = weights.flatten(1)[:, :vocabulary]
    inside.copy_(logits).sub_(highest).div_(temperature).exp_()
    return weights


def _invert(weights: Tensor, uniforms: Tensor) -> _Hit:
    """Find the interval of `weights` `[B, K]`, laid end to end, that `uniforms` `[B]` falls into; 0 is never hit."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    target = uniforms[:, None] * cumulative[:, -1:]
    # A model that has diverged gives NaN, which would point beyond the end; its log-probability will tell.
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    width = weights.gather(-1, index)
    start = cumulative.gather(-1, index) - width
    # Rounding could reach 1, which is the next interval.
    rest = ((target - start) / width).clamp(0, 1 - 2**-40)
    return _Hit(index.squeeze(-1), rest.squeeze(-1))


def _draw(weights: Tensor, uniforms: Tensor, *, totals: Tensor) -> Tensor:
    block = _invert(totals, uniforms)
    rows = torch.arange(len(weights), device=weights.device)
    return block.interval * _BLOCK + _invert(weights[rows, block.interval], block.rest).interval


def _draw_from_top(weights: Tensor, uniforms: Tensor, *, top_k: int, top_p: float, is_static: bool) -> Tensor:
    candidates: Any
    if top_k:
        candidates = weights.topk(min(top_k, weights.shape[-1]))
    else:
        candidates = weights.sort(-1, descending=True) if is_static else _most_likely(weights, top_p)
    mass = (candidates.values if top_k else weights).sum(-1, keepdim=True, dtype=torch.float64)
    before = candidates.values.cumsum(-1, dtype=torch.float64) - candidates.values
    kept = candidates.values.where(before < top_p * mass, 0.0)
    tokens: Tensor = candidates.indices.gather(-1, _invert(kept, uniforms).interval[:, None]).squeeze(-1)
    return tokens


def _most_likely(weights: Tensor, share: float) -> torch.return_types.topk:
    """Tokens in descending order, at least as many as hold `share` of the weight: sorting all of them is slow."""
    needed = share * weights.sum(-1, dtype=torch.float64)
    count = min(_FEW, weights.shape[-1])
    while True:
        candidates = weights.topk(count)
        enough = candidates.values.sum(-1, dtype=torch.float64) >= needed
        if count == weights.shape[-1] or bool(enough.all()):
            return candidates
        count = min(4 * count, weights.shape[-1])


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's step and finaliser on int64, whose products wrap around as unsigned ones do."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch fills with the sign."""
    return x >> bits & (1 << 64 - bits) - 1


def _signed(value: int) -> int:
    """The int64 with the bits of `value` modulo 2**64."""
    return (value + 2**63) % 2**64 - 2**63
