"""Forward passes over prompts with responses: log-probabilities, entropies, values, and the outputs of a scalar head.

Rows of similar length go through a model together, without the columns that are padding in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rlhf.algorithms.logprobs import TokenStatistics, Wanted
from rlhf.config.bounds import MicroBatchLimit
from rlhf.micro_batches import pieces_by_length
from rlhf.models.causal_lm import position_ids, token_statistics
from rlhf.models.scalar_head import response_values
from rlhf.runtime.dist import max_over_ranks
from rlhf.types import Responses

Around = Callable[[Any], AbstractContextManager[Any]]
"""Makes the context of a forward from its batch."""


def response_statistics(
    model: Callable[..., Any],
    batch: Responses,
    *,
    temperature: float,
    entropy_grad: bool = False,
    chunk_elements: int | None = None,
) -> TokenStatistics:
    """Log-probability and entropy, `[B, R]` fp32, of the response tokens that count; settings as in `Wanted`.

    Old, new and reference log-probabilities all come from this function, so that their ratios are 1 before an update.
    """
    wanted = Wanted(temperature, entropy=True, entropy_grad=entropy_grad, chunk_elements=chunk_elements)
    return token_statistics(
        model, batch.sequences, attention_mask=batch.attention_mask, mask=batch.response_mask, wanted=wanted
    )


def all_statistics(
    model: Callable[..., Any],
    responses: Responses,
    *,
    limit: MicroBatchLimit,
    temperature: float,
    around: Around = nullcontext,
) -> Tensor:
    """Log-probabilities and entropies, `[2, B, R]`, 0 where masked, in pieces within `limit`; a collective.

    The forward of each piece runs inside `around(piece)`.
    """

    def statistics(piece: Responses) -> Tensor:
        found = response_statistics(model, piece, temperature=temperature)
        return torch.stack((found.logprobs, found.entropy))

    return in_pieces(responses, limit, function=statistics, around=around)


def critic_values(critic: Callable[..., Tensor], batch: Responses, *, shift: float) -> Tensor:
    """The critic's estimate before each response token, `[B, R]`, in units of normalised scores."""
    return response_values(scalar_outputs(critic, batch), batch.response_mask.shape[1]) - shift


def scalar_outputs(model: Callable[..., Tensor], batch: Responses) -> Tensor:
    """The output of a scalar head at every position, `[B, T]`."""
    return model(batch.sequences, batch.attention_mask, position_ids=position_ids(batch.attention_mask))


def in_pieces(
    responses: Responses,
    limit: MicroBatchLimit,
    *,
    function: Callable[[Responses], Tensor],
    around: Around = nullcontext,
) -> Tensor:
    """Apply `function` to pieces of rows of similar length, trimmed; `[K, b, r]` each, together `[K, B, R]`.

    It is called inside `around(piece)`, equally often on every rank.

    Training cuts its minibatches into other pieces. In fp32 the difference does not matter. With 16-bit weights a
    kernel may round a row differently in another shape, so some of the new log-probabilities differ from the old ones
    even before the first update (in bf16 every twelfth, by up to 0.2).
    """
    found: Tensor | None = None
    for rows in agreed_pieces(responses, limit):
        piece = responses.rows(rows).trimmed()
        with around(piece):
            values = function(piece) * piece.response_mask  # [K, b, r]
        if found is None:
            found = values.new_zeros(len(values), *responses.response_mask.shape)
        found[:, rows, : values.shape[-1]] = values
    assert found is not None, "a rollout has at least one row"
    return found


def agreed_pieces(responses: Responses, limit: MicroBatchLimit) -> list[Tensor]:
    """Row numbers of each piece within `limit`; equally many pieces on every rank, if ranks have equally many rows.

    Every rank must call it, because a forward may be a collective, and lengths differ between ranks.
    """
    lengths = responses.lengths
    pieces = pieces_by_length(lengths, limit)
    if limit.tokens is None:
        return pieces
    count = torch.tensor(len(pieces), device=responses.sequences.device)
    return pieces_by_length(lengths, limit, at_least=int(max_over_ranks(count)))  # a collective, and a wait for it
