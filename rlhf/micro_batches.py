"""Rows of any lengths are cut into micro-batches, and these are dealt to the ranks: in the same way on every rank.

Rows of similar length share a micro-batch. Where its tokens are limited, there are as few as the limit allows, and as
even ones as their number allows, because ranks that meet in collectives wait for the slowest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf.config.bounds import MicroBatchLimit
from rlhf.types import width_of


def pieces_by_length(lengths: Tensor, limit: MicroBatchLimit, *, ranks: int = 1, at_least: int = 1) -> list[Tensor]:
    """Row numbers `[b]` of each micro-batch, that with the most tokens first.

    Args:
        lengths: Tokens of each row, `[B]`; or `[B, K]`, of K parts of a row that are padded apart.
        limit: What a micro-batch may hold; a row with more tokens is alone.
        ranks: The number of pieces is a multiple of it; with too few rows some pieces are empty.
        at_least: There are at least so many pieces, where tokens are limited.
    """
    lengths = lengths.view(len(lengths), -1)  # [B] or [B, K] -> [B, K]
    order = lengths.sum(-1).argsort(descending=True, stable=True)
    if limit.tokens is None:
        return list(order.tensor_split(-(-len(order) // (limit.rows * ranks)) * ranks))
    rows = lengths[order].tolist()

    def filled(tokens: int) -> list[int]:
        return _filled(rows, replace(limit, tokens=tokens))

    count = max(at_least, -(-len(filled(limit.tokens)) // ranks) * ranks)
    # The fewer tokens, the more pieces: search for the fewest tokens that do with `count` of them.
    tokens = bisect_left(range(limit.tokens), True, lo=1, key=lambda tokens: len(filled(tokens)) <= count)
    pieces = list(torch.split(order, filled(tokens)))
    while len(pieces) < count:  # a piece fewer would do, too: cut the one with the most rows
        place = max(range(len(pieces)), key=lambda place: len(pieces[place]))
        pieces[place : place + 1] = pieces[place].tensor_split(2)
    return sorted(pieces, key=lambda piece: padded_tokens(lengths[piece]), reverse=True)


def padded_tokens(lengths: Tensor) -> int:
    """The tokens of a micro-batch of rows `[B, K]`, padding included."""
    return len(lengths) * width_of(int(lengths.amax(0).sum())) if len(lengths) else 0


def deal(pieces: Sequence[Tensor], *, ranks: int) -> list[list[Tensor]]:
    """The pieces of each rank, from pieces in the order of their tokens, whose number is a multiple of `ranks`.

    Those of a turn are neighbours, so ranks take equally long to the next collective. Every second turn goes the other
    way round, so they also have nearly as many tokens in total.
    """
    turns = [pieces[start : start + ranks] for start in range(0, len(pieces), ranks)]
    return [[turn[-1 - rank if number % 2 else rank] for number, turn in enumerate(turns)] for rank in range(ranks)]


def _filled(rows: Sequence[Sequence[int]], limit: MicroBatchLimit) -> list[int]:
    """How many of the following rows `[K]` each piece takes if all take as many as they may: no cut needs fewer."""
    sizes: list[int] = []
    widest: list[int] = []
    for row in rows:
        wider = list(map(max, widest, row)) if sizes else list(row)
        if sizes and sizes[-1] < limit.rows_of(width_of(sum(wider))):
            sizes[-1] += 1
            widest = wider
        else:
            sizes.append(1)
            widest = list(row)
    return sizes
