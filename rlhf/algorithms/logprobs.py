"""Log-probability and entropy of each token from logits: the one place where the shift by one happens.

[Note: alignment] A language model's logits at position n speak of token n + 1. The functions here take logits
`[B, N, V]` of one of two kinds and return `[B, R]`, whose index t speaks of target t:

* N = R: already aligned, `logits[:, t]` predicts target t.
* N > R: logits of a whole sequence, or of its end, whose last R tokens are the targets. The last logit predicts a
  token beyond the sequence and is not used: `logits[:, N - R - 1 : N - 1]` predict the targets.

[Note: memory] Logits are the largest tensor of a training step, and fp32 copies of them are what runs out of memory.
Here the work is done chunk by chunk: no fp32 tensor has more than `chunk_elements` elements (or one row of V),
autograd keeps the logits themselves and nothing else of their size, and backward recomputes the softmax of a chunk
and writes its gradient in the logits' own dtype. Hand over whole logits rather than a slice of them: autograd
would pad the gradient of the slice into one more tensor of that size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.algorithms.masked import at_least_fp32

CHUNK_ELEMENTS = 2**24
"""Logits worked on at a time: 64 MiB in fp32, enough to keep a GPU busy."""
CPU_CHUNK_ELEMENTS = 2**20
"""The same on a CPU: 4 MiB in fp32, which stay in its cache."""


class TokenStatistics(NamedTuple):
    """Log-probability of each target, entropy of the distribution it was drawn from, and whether it was the likeliest.

    What is not wanted is 0.
    """

    logprobs: Tensor  # [B, R] log-probability of each target, in nats
    entropy: Tensor  # [B, R] entropy in nats
    first_choice: Tensor  # [B, R] 1 where the target has the first of the largest logits, else 0


class Wanted(NamedTuple):
    """The statistics to compute beside log-probabilities, and how."""

    temperature: float = 1.0
    """Divides the logits, in fp32."""
    entropy: bool = False
    """Entropies are needed."""
    entropy_grad: bool = False
    """A gradient will come for them."""
    first_choice: bool = False
    """Whether a target is the likeliest token is needed."""
    chunk_elements: int | None = None
    """Logits in fp32 at a time, see [Note: memory]; None takes as many as suit their device."""


def statistics_of_logits(logits: Tensor, targets: Tensor, *, wanted: Wanted) -> TokenStatistics:
    """The statistics of each target, `[B, R]` in fp32 (fp64 for fp64 logits).

    Log-probabilities and entropies are differentiable once in the logits.

    Args:
        logits: `[B, N, V]` of any floating dtype; N >= R, see [Note: alignment].
        targets: `[B, R]` token ids. Masked positions may hold any valid id, but no marker such as -100.
        wanted: Which statistics.

    Raises:
        ValueError: for logits too short, a temperature that is not positive, or ids outside the vocabulary. The ids
            are checked on the CPU only, as reading them would wait for the GPU; there, CUDA's own index assertion ends
            the process.
    """
    check_targets(targets, logits.shape[-1], temperature=wanted.temperature)
    if logits.dim() != 3 or targets.dim() != 2 or logits.shape[0] != targets.shape[0]:
        raise ValueError(
            f"found logits of shape {tuple(logits.shape)} and targets of shape {tuple(targets.shape)}, expected "
            "[B, N, V] and [B, R]"
        )
    found = _TokenStatistics.apply(logits, targets.long(), wanted)  # type: ignore[no-untyped-call]
    logprobs, entropy = found
    first_choice = torch.zeros_like(logprobs)
    if wanted.first_choice:
        first_choice.copy_(_window(logits.detach(), targets.shape[1]).argmax(-1) == targets)
    return TokenStatistics(logprobs, torch.zeros_like(logprobs) if entropy is None else entropy, first_choice)


class _TokenStatistics(torch.autograd.Function):
    """Log-probabilities and, if wanted, entropies, in chunks. See [Note: memory]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor | None]:
        window = _window(logits, targets.shape[1])
        logprobs = _empty_statistic(window)
        entropy = _empty_statistic(window) if wanted.entropy else None
        for rows in _chunks(window, wanted.chunk_elements):
            chunk = scaled(window[rows], wanted.temperature).log_softmax(-1)
            logprobs[rows] = chunk.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)
            if entropy is not None:
                entropy[rows] = torch.special.entr(chunk.exp_()).sum(-1)  # H = sum_j -p_j log p_j
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets)
        ctx.temperature, ctx.chunk_elements = wanted.temperature, wanted.chunk_elements
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprobs_grad: Tensor | None, entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets = ctx.saved_tensors
        logits_grad = torch.zeros_like(logits)
        window, window_grad = _window(logits, targets.shape[1]), _window(logits_grad, targets.shape[1])
        for rows in _chunks(window, ctx.chunk_elements):
            probabilities = scaled(window[rows], ctx.temperature).softmax(-1)
            scaled_grad = torch.zeros_like(probabilities)  # with respect to z = logits / temperature
            if logprobs_grad is not None:
                _add_logprobs_grad(scaled_grad, probabilities, targets=targets[rows], grad=logprobs_grad[rows])
            if entropy_grad is not None:
                add_entropy_grad(scaled_grad, probabilities, grad=entropy_grad[rows])
            window_grad[rows] = scaled_grad.div_(ctx.temperature)
        return logits_grad, *(None,) * 2


def _add_logprobs_grad(total: Tensor, probabilities: Tensor, *, targets: Tensor, grad: Tensor) -> None:
    """Add the gradient of log p_target: d log p_target / d z_j = [j = target] - p_j."""
    grad = grad.unsqueeze(-1)
    total.addcmul_(probabilities, grad, value=-1)
    total.scatter_add_(-1, targets.unsqueeze(-1), grad.to(total.dtype))


def add_entropy_grad(total: Tensor, probabilities: Tensor, *, entropy: Tensor | None = None, grad: Tensor) -> None:
    """Add the gradient of H: d H / d z_j = -p_j (log p_j + H), by way of -p log p, which is 0, not NaN, at p = 0.

    `entropy` is H where `probabilities` are those of some tokens only.
    """
    surprise = torch.special.entr(probabilities)  # -p_j log p_j
    whole = surprise.sum(-1, keepdim=True) if entropy is None else entropy.unsqueeze(-1)
    surprise.addcmul_(probabilities, whole, value=-1)
    total.addcmul_(surprise, grad.unsqueeze(-1))


def window_start(length: int, num_targets: int) -> int:
    """The first of `length` positions that predicts a target. See [Note: alignment]."""
    if length < num_targets:
        raise ValueError(
            f"found logits at {length} positions for {num_targets} targets, expected one per target, or the logits of "
            "a sequence that ends with the targets"
        )
    return 0 if length == num_targets else length - num_targets - 1


def _window(logits: Tensor, num_targets: int) -> Tensor:
    """The logits that predict the targets, a view `[B, R, V]`."""
    start = window_start(logits.shape[1], num_targets)
    return logits[:, start : start + num_targets]


def chunk_elements_of(device: torch.device) -> int:
    """Number of logits to work on at a time on `device`."""
    return CPU_CHUNK_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS


def _chunks(window: Tensor, elements: int | None) -> Iterator[tuple[slice, slice]]:
    """Cut `[B, R, V]` into blocks of whole rows, several sequences at a time where they are short."""
    num_sequences, num_tokens, vocabulary = window.shape
    rows = max(1, (elements or chunk_elements_of(window.device)) // vocabulary)
    sequences_per_chunk, tokens_per_chunk = max(1, rows // max(1, num_tokens)), max(1, min(rows, num_tokens))
    for sequence in range(0, num_sequences, sequences_per_chunk):
        for token in range(0, num_tokens, tokens_per_chunk):
            yield slice(sequence, sequence + sequences_per_chunk), slice(token, token + tokens_per_chunk)


def scaled(chunk: Tensor, temperature: float) -> Tensor:
    """The chunk in at least fp32, divided by the temperature there."""
    chunk = at_least_fp32(chunk)
    return chunk if temperature == 1.0 else chunk / temperature


def _empty_statistic(window: Tensor) -> Tensor:
    return window.new_empty(window.shape[:2], dtype=torch.promote_types(window.dtype, torch.float32))


def check_targets(targets: Tensor, vocabulary: int, *, temperature: float) -> None:
    """Raise ValueError for ids outside the vocabulary (on a CPU) or a temperature that is not positive."""
    if not temperature > 0:
        raise ValueError(
            f"found temperature {temperature}, expected a positive number; greedy choice has no log-probability"
        )
    if targets.device.type == "cpu" and targets.numel():
        lowest, highest = (int(bound) for bound in targets.aminmax())
        if lowest < 0 or highest >= vocabulary:
            raise ValueError(
                f"found target ids from {lowest} to {highest}, expected 0 to {vocabulary - 1}; give masked "
                "positions any valid id and leave them out with a mask, not with a marker such as -100"
            )
