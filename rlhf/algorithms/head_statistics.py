"""Log-probability and entropy of tokens straight from hidden states, without logits of whole sequences.

Logits, `[B, T, V]`, were the largest tensor of a training step. Here a model's head is applied to a few positions at a
time, and only to those whose token counts: prompts, padding and masked tokens never reach it. Alignment and arithmetic
are those of `logprobs.py`: logits in the working type, the softmax in at least fp32.

[Note: backward] A matrix product of N hidden states `[N, D]` with the head `[V, D]` is the unit of work.

* The head is frozen, and only log-probabilities learn: their gradient in the hidden states, `W_target - sum_j p_j W_j`
  `[N, D]`, is computed beside them and scaled in backward. Two units in all, as with whole logits.
* The head learns, or entropies do: backward computes the logits again, for a slice of the vocabulary at a time and all
  positions at once. So each row of the head's gradient is one sum over all positions inside a matrix product, which
  accumulates in fp32, and is written once; a running sum in fp32 would take `[V, D]` more. Four units instead of three.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.algorithms.logprobs import (
    TokenStatistics,
    Wanted,
    add_entropy_grad,
    check_targets,
    chunk_elements_of,
    scaled,
    window_start,
)

LOGITS_PER_CHUNK = 4
"""Logits in the working type that are there at once, in units of `chunk_elements`, which are in fp32."""


class Head(NamedTuple):
    """A linear head, and what the model does to its output: `cap * tanh(scale * (W h + b) / cap)`."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor, vocabulary: slice = slice(None)) -> Tensor:
        """`[N, D]` -> `[N, V]` in the working type, or those of a slice of the vocabulary."""
        out = F.linear(hidden, self.weight[vocabulary], None if self.bias is None else self.bias[vocabulary])
        if self.scale != 1.0:
            out.mul_(self.scale)
        return out if self.cap is None else out.div_(self.cap).tanh_().mul_(self.cap)

    def chain(self, grad: Tensor, logits: Tensor) -> Tensor:
        """`grad` with respect to the logits becomes that with respect to `W h + b`, in place."""
        if self.cap is not None:
            grad.mul_(1 - (logits.to(grad.dtype) / self.cap).square_())
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


def head_statistics(hidden: Tensor, head: Head, targets: Tensor, mask: Tensor, *, wanted: Wanted) -> Tensor:
    """The fields of `TokenStatistics`, stacked, `[B, R, 3]` in at least fp32; 0 where masked or not wanted.

    Args:
        hidden: `[B, N, D]`, what the head is applied to; N >= R, see [Note: alignment] in `logprobs.py`.
        head: The head.
        targets: `[B, R]` token ids; any valid id where masked.
        mask: `[B, R]`, True where a token counts.
        wanted: Which statistics, and how. Log-probabilities are differentiable once in `hidden`, weight and bias;
            entropies only with `wanted.entropy_grad`.

    Raises:
        ValueError: as `statistics_of_logits`.
    """
    check_targets(targets, head.weight.shape[0], temperature=wanted.temperature)
    learns = torch.is_grad_enabled()  # inside the function below autograd is always off
    call = _HeadCall(targets.long(), mask.bool(), wanted, head.scale, head.cap, learns)
    found: Tensor = _HeadStatistics.apply(call, hidden, head.weight, head.bias)  # type: ignore[no-untyped-call]
    return found


class _HeadCall(NamedTuple):
    targets: Tensor  # [B, R]
    mask: Tensor  # [B, R]
    wanted: Wanted
    scale: float
    cap: float | None
    learns: bool


class _Positions(NamedTuple):
    """Where the N tokens that count are."""

    row: Tensor  # [N], in 0..B
    token: Tensor  # [N], in 0..R
    start: int  # of the targets among the hidden states

    @classmethod
    def of(cls, mask: Tensor, hidden: Tensor) -> _Positions:
        num_targets = mask.shape[1]
        index = mask.flatten().nonzero().squeeze(1)  # [B, R] -> [N]; the host waits for the device, once a forward
        width = max(num_targets, 1)
        row = index.div(width, rounding_mode="floor")
        return cls(row, index - row * width, window_start(hidden.shape[1], num_targets))

    def pick(self, hidden: Tensor) -> Tensor:
        """`[B, n, D]` -> `[N, D]`."""
        return hidden[self.row, self.token + self.start]

    def spread(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """`[N, D]` -> `[B, n, D]`, with 0 elsewhere."""
        whole = rows.new_zeros(shape)
        whole[self.row, self.token + self.start] = rows
        return whole


class _Gradients(NamedTuple):
    """With respect to the tensors that a head is given; None where nobody needs it."""

    hidden: Tensor | None  # [N, D], or [B, n, D]
    weight: Tensor | None = None  # [V, D]
    bias: Tensor | None = None  # [V]


class _HeadStatistics(torch.autograd.Function):
    """See [Note: backward]."""

    @staticmethod
    def forward(ctx: Any, call: _HeadCall, hidden: Tensor, *matrix: Tensor | None) -> Tensor:
        weight, bias = matrix
        assert weight is not None
        head, wanted, mask = Head(weight, bias, call.scale, call.cap), call.wanted, call.mask
        positions = _Positions.of(mask, hidden)
        rows, ids = positions.pick(hidden), call.targets[positions.row, positions.token]
        hidden_learns, *head_learns = (call.learns and needed for needed in ctx.needs_input_grad[1:])
        again = any(head_learns) or (hidden_learns and wanted.entropy_grad)
        slope = torch.empty_like(rows) if hidden_learns and not again else None
        norm = rows.new_empty(len(rows), 2, dtype=_exact(rows)) if again else None
        found = _in_rows(head, rows, ids, wanted=wanted, slope=slope, norm=norm)
        ctx.shape, ctx.start, ctx.again = hidden.shape, positions.start, again
        ctx.wanted, ctx.scale, ctx.cap = wanted, call.scale, call.cap
        where = (positions.row, positions.token)
        ctx.save_for_backward(*where, *((rows, weight, bias, ids, norm, found[:, 1]) if again else (slope,)))
        whole = found.new_zeros(*mask.shape, found.shape[1])  # [N, 3] -> [B, R, 3]
        whole[where] = found
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        row, token, *saved = ctx.saved_tensors
        positions = _Positions(row, token, ctx.start)
        grad = grad[row, token]  # [B, R, 3] -> [N, 3]
        if not ctx.again:
            (slope,) = saved
            rows_grad = (slope * grad[:, :1]).to(slope.dtype)
            return (None, *_Gradients(positions.spread(rows_grad, ctx.shape)))
        rows, weight, bias, ids, norm, entropy = saved
        head = Head(weight, bias, ctx.scale, ctx.cap)
        upstream = _Upstream(ids, norm, entropy, grad, ctx.wanted)
        grads = _in_slices(head, rows, upstream, needed=ctx.needs_input_grad[1:])
        hidden_grad = positions.spread(grads.hidden, ctx.shape) if ctx.needs_input_grad[1] else None  # type: ignore[arg-type]
        return (None, *grads._replace(hidden=hidden_grad))


def _in_rows(
    head: Head, rows: Tensor, ids: Tensor, *, wanted: Wanted, slope: Tensor | None, norm: Tensor | None
) -> Tensor:
    """Statistics `[N, 3]`, some positions at a time; fills `slope` `[N, D]` and `norm` `[N, 2]`, whichever is there."""
    vocabulary = head.weight.shape[0]
    found = rows.new_zeros(len(rows), len(TokenStatistics._fields), dtype=_exact(rows))
    elements = wanted.chunk_elements or chunk_elements_of(rows.device)
    for chunk in _pieces(len(rows), LOGITS_PER_CHUNK * elements // vocabulary):
        logits = head.logits(rows[chunk])  # [n, V]
        for part in _pieces(len(logits), elements // vocabulary):
            here = slice(chunk.start + part.start, chunk.start + part.stop)
            write = None if norm is None else norm[here]
            logprobs = _statistics(logits[part], ids[here], wanted=wanted, out=found[here], norm=write)
            if slope is not None:
                probabilities = logprobs if wanted.entropy else logprobs.exp_()
                logits[part] = _slope(head, logits[part], probabilities, ids[here], temperature=wanted.temperature)
        if slope is not None:  # the logits have become their gradient
            torch.mm(logits, head.weight, out=slope[chunk])  # [n, V] [V, D] -> [n, D]
    return found


def _statistics(logits: Tensor, ids: Tensor, *, wanted: Wanted, out: Tensor, norm: Tensor | None) -> Tensor:
    """Write the statistics `[n, 3]` and, if it is there, `norm` `[n, 2]` of logits `[n, V]`.

    Returns:
        Log-probabilities `[n, V]`; with `wanted.entropy`, probabilities.
    """
    z = scaled(logits, wanted.temperature)
    logprobs = z.log_softmax(-1)
    out[:, 0] = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)
    if wanted.first_choice:
        out[:, 2] = (logits.argmax(-1) == ids).to(out.dtype)
    if norm is not None:  # log p = z - norm[0] - norm[1], in this order, as in `log_softmax`
        norm[:, 0] = z.amax(-1)
        norm[:, 1] = -logprobs.amax(-1)
    if wanted.entropy:
        out[:, 1] = torch.special.entr(logprobs.exp_()).sum(-1)  # H = sum_j -p_j log p_j
    return logprobs


def _slope(head: Head, logits: Tensor, probabilities: Tensor, ids: Tensor, *, temperature: float) -> Tensor:
    """Gradient `[n, V]` of log p_target in `W h + b`, in place of the probabilities: [j = target] - p_j."""
    grad = probabilities.neg_()
    grad.scatter_add_(1, ids.unsqueeze(1), grad.new_ones(len(ids), 1))
    return head.chain(grad.div_(temperature), logits)


class _Upstream(NamedTuple):
    """What backward knows of N positions."""

    ids: Tensor  # [N]
    norm: Tensor  # [N, 2], largest logit, and log of the sum of exponentials of differences to it
    entropy: Tensor  # [N]
    grad: Tensor  # [N, 3], of the statistics
    wanted: Wanted

    def of_logits(self, head: Head, logits: Tensor, part: slice, first: int) -> Tensor:
        """Gradient `[n, v]` in `W h + b` for the positions of `part` and the vocabulary from `first` on."""
        grad, ids = self.grad[part], self.ids[part] - first
        norm = self.norm[part]
        probabilities = scaled(logits, self.wanted.temperature).sub(norm[:, :1]).sub_(norm[:, 1:]).exp_()
        inside = (ids >= 0) & (ids < logits.shape[1])  # the other targets are in other slices
        total = probabilities * -grad[:, :1]
        chosen = ids.clamp(0, logits.shape[1] - 1).unsqueeze(1)
        total.scatter_add_(1, chosen, (grad[:, 0] * inside).unsqueeze(1))
        if self.wanted.entropy_grad:
            add_entropy_grad(total, probabilities, entropy=self.entropy[part], grad=grad[:, 1])
        return head.chain(total.div_(self.wanted.temperature), logits)


def _in_slices(head: Head, rows: Tensor, upstream: _Upstream, *, needed: tuple[bool, ...]) -> _Gradients:
    """Gradients of the hidden states `[N, D]`, the weight and the bias, a slice of the vocabulary at a time."""
    vocabulary = head.weight.shape[0]
    # In fp32, because it is summed over slices; zeros, because there may be no positions.
    rows_grad = rows.new_zeros(rows.shape, dtype=_exact(rows))
    weight_grad = torch.empty_like(head.weight) if needed[1] else None
    bias_grad = torch.empty_like(head.bias) if head.bias is not None and needed[2] else None
    elements = upstream.wanted.chunk_elements or chunk_elements_of(rows.device)
    for words in _pieces(vocabulary, LOGITS_PER_CHUNK * elements // max(1, len(rows))):
        logits = head.logits(rows, words)  # [N, v]
        for part in _pieces(len(rows), elements // logits.shape[1]):
            logits[part] = upstream.of_logits(head, logits[part], part, words.start)
        if weight_grad is not None:
            torch.mm(logits.T, rows, out=weight_grad[words])  # [v, N] [N, D] -> [v, D]
        if bias_grad is not None:
            bias_grad[words] = logits.sum(0)
        if needed[0]:
            rows_grad += logits @ head.weight[words]  # [N, v] [v, D] -> [N, D]
    return _Gradients(rows_grad.to(rows.dtype), weight_grad, bias_grad)


def _exact(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _pieces(total: int, size: int) -> Iterator[slice]:
    """Cut `total` into slices of at most `size`, which counts as 1 where it is 0."""
    for start in range(0, total, max(1, size)):
        yield slice(start, min(total, start + max(1, size)))
