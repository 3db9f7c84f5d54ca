"""How rollouts travel between ranks.

What is small, and what whitening, groups and metrics compare, goes to every rank: numbers `[B]` and `[B, R]`, in one
collective. Sequences `[B, T]`, and whatever else belongs to `Sequences`, stay where they were generated; before each
minibatch a rank receives the rows that it trains on, in one more. Texts go nowhere until somebody reads them.

Rows travel as bytes, the fields of a row side by side, so types survive bit for bit and nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.runtime.dist import World, exchange_rows, gather_objects, gather_rows, max_over_ranks
from rlhf.types import HeldRows, Responses, Rollout, Sequences

Batch = TypeVar("Batch", bound=Responses | Rollout | Sequences)

_OF_SEQUENCE = ("sequences", "attention_mask")
"""Fields whose second dimension is T; that of the others is R."""
_OF_ROW = ("source_scores",)
"""Fields with columns that are no tokens."""


def gather_rollout(rollout: Rollout, *, pad_id: int, world: World) -> Rollout:
    """From each rank's rollout, equally many rows, that of all ranks; every rank must call it."""
    device = rollout.response_mask.device
    # The first of two collectives: ranks may have stopped at different lengths.
    widest = max_over_ranks(torch.tensor(widths(rollout), device=device)).tolist()
    padded: Rollout = padded_to(rollout, widest[0], num_response=widest[1], pad_id=pad_id)
    columns = tensors_of(padded) | {"num_tokens": rollout.held.num_tokens.to(device)}
    gathered = unpacked(gather_rows(packed(columns)), columns)  # the second
    held = HeldRows.of(padded.held.own, gathered.pop("num_tokens"), rank=world.rank, ranks=world.size)
    return replace(padded, held=held, **gathered)


def fetched(held: HeldRows, wanted: Sequence[Tensor]) -> Sequences:
    """The sequences of the rows `wanted[rank]` `[N]` on each rank, in that order; every rank must call it alike.

    Their texts are empty: nobody reads them there.
    """
    own, device = held.own, held.own.sequences.device
    # What this rank sends to each: the rows wanted there that it holds. What it receives: its own, from their holders.
    leaving = [rows[held.holders[rows] == held.rank] for rows in wanted]
    holders, here = held.holders[wanted[held.rank]], held.places[wanted[held.rank]]
    coming = [wanted[held.rank][holders == rank] for rank in range(held.ranks)]
    places = held.places[torch.cat(leaving)]
    # Rows arrive by the rank that held them, and in the order in which they are wanted.
    by_holder = holders.argsort(stable=True)
    order = by_holder.argsort()

    columns = tensors_of(own)
    rows = packed({name: values[places.to(device)] for name, values in columns.items()})
    arrived = exchange_rows(rows, list(map(len, leaving)), received=list(map(len, coming)))  # a collective

    def ragged(states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        """The same for B of `[t, D]`, as long as the sequences; only those of other ranks are copied."""
        if states is None:
            return None
        away = [rows[:0] if rank == held.rank else rows for rank, rows in enumerate(leaving)]
        near = [rows[:0] if rank == held.rank else rows for rank, rows in enumerate(coming)]
        tokens = torch.cat([states[0][:0], *(states[place] for place in held.places[torch.cat(away)].tolist())])
        sizes = [[int(held.num_tokens[rows].sum()) for rows in parts] for parts in (away, near)]
        # In host memory, so it is gloo's: [tokens, D] as bytes, because gloo may not know the type.
        found = exchange_rows(tokens.view(torch.uint8), sizes[0], received=sizes[1]).view(tokens.dtype)
        parts = iter(torch.split(found, held.num_tokens[torch.cat(near)].tolist()))
        arrived = [
            states[place] if holder == held.rank else next(parts)
            for holder, place in zip(*(column[by_holder].tolist() for column in (holders, here)), strict=True)
        ]
        return tuple(arrived[place] for place in order.tolist())

    return Sequences(
        **unpacked(arrived[order.to(device)], columns),
        prompts=("",) * len(order),
        responses=("",) * len(order),
        actor_states=ragged(own.actor_states),
        critic_states=ragged(own.critic_states),
    )


def texts_of(held: HeldRows, *, limit: int | None = None) -> list[tuple[str, str]]:
    """Prompt and response of the first `limit` rows, or of all, on every rank; every rank must call it alike."""
    where = list(zip(held.holders.tolist(), held.places.tolist(), strict=True))[:limit]
    own = held.own
    mine = [(own.prompts[place], own.responses[place]) for holder, place in where if holder == held.rank]
    parts = [iter(part) for part in gather_objects(mine)]  # a collective; each part in the order of the rows
    return [next(parts[holder]) for holder, _ in where]


def widths(batch: Responses | Rollout) -> tuple[int, int]:
    """Columns of the prompt P and of the response R."""
    num_response = batch.response_mask.shape[1]
    sequences = batch.held.own.sequences if isinstance(batch, Rollout) else batch.sequences
    return sequences.shape[1] - num_response, num_response


def padded_to(batch: Any, num_prompt: int, *, num_response: int, pad_id: int) -> Any:
    """The same rows, `Responses` or a `Rollout`, with more padding.

    Prompts have `num_prompt` columns then, responses `num_response`.
    """
    left, right = num_prompt - widths(batch)[0], num_response - widths(batch)[1]
    if isinstance(batch, Rollout):
        own = _padded(batch.held.own, left, right=right, pad_id=pad_id)
        batch = replace(batch, held=replace(batch.held, own=own))
    return _padded(batch, left, right=right, pad_id=pad_id)


def _padded(batch: Any, left: int, *, right: int, pad_id: int) -> Any:
    columns = {}
    for name, values in tensors_of(batch).items():
        if values.dim() > 1 and name not in _OF_ROW:
            before = left if name in _OF_SEQUENCE else 0
            filler = pad_id if name == "sequences" else 0
            # `pad` counts dimensions from the last one: [B, T, ...] grows in T.
            columns[name] = pad(values, (*[0, 0] * (values.dim() - 2), before, right), value=filler)
    return replace(batch, **columns)


def concatenated(parts: Sequence[Batch]) -> Batch:
    """Concatenate the rows of equally wide batches."""

    def join(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            return None
        if isinstance(values[0], HeldRows):
            return _concatenated_held(values)
        return torch.cat(values) if isinstance(values[0], Tensor) else tuple(text for texts in values for text in texts)

    columns: dict[str, Any] = {field.name: join(field.name) for field in fields(parts[0])}
    return replace(parts[0], **columns)


def _concatenated_held(parts: Sequence[HeldRows]) -> HeldRows:
    each = torch.tensor([0, *(len(part.own.prompts) for part in parts)]).cumsum(0)  # the same on every rank
    return replace(
        parts[0],
        own=concatenated([part.own for part in parts]),
        holders=torch.cat([part.holders for part in parts]),
        places=torch.cat([part.places + start for part, start in zip(parts, each, strict=False)]),
        num_tokens=torch.cat([part.num_tokens for part in parts]),
    )


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """The tensor fields of a batch, by name."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def packed(columns: Mapping[str, Tensor]) -> Tensor:
    """Tensors `[N, ...]` of any types as the bytes of N rows, `[N, bytes]` uint8."""
    # [N, ...] -> [N, elements] -> [N, bytes]
    return torch.cat([_flat(values).view(torch.uint8) for values in columns.values()], dim=1)


def unpacked(rows: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `packed`, for tensors of the types and shapes of `like`, with any number of rows."""
    sizes = [prod(values.shape[1:]) * values.element_size() for values in like.values()]
    # Clones, because a type of several bytes begins at a multiple of its size; flat, because there may be no columns.
    parts = [part.clone(memory_format=torch.contiguous_format).flatten() for part in torch.split(rows, sizes, dim=1)]
    return {
        name: part.view(values.dtype).view(len(rows), *values.shape[1:])
        for (name, values), part in zip(like.items(), parts, strict=True)
    }


def _flat(values: Tensor) -> Tensor:
    return values.reshape(len(values), prod(values.shape[1:])).contiguous()
