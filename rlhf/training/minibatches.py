"""Minibatches of a rollout, and the micro-batches that each rank has of them.

Every rank cuts in the same way, because all know the numbers of the whole rollout, and then receives the sequences of
its own share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rlhf.config.ppo_config import PPOConfig
from rlhf.micro_batches import deal, pieces_by_length
from rlhf.row_exchange import fetched
from rlhf.types import Experience, PPOBatch


def all_minibatches(batch: Experience, config: PPOConfig, *, iteration: int) -> Iterator[Experience]:
    """The minibatches of all epochs; each epoch has an order of its own."""
    for epoch in range(1, config.epochs + 1):
        yield from minibatches(batch, config, seed=(config.seed * 1_000_003 + iteration) * 1_009 + epoch)


def minibatches(batch: Experience, config: PPOConfig, *, seed: int) -> Iterator[Experience]:
    """One epoch over the rollout in a random order that depends on the seed alone.

    Each has `minibatch_size` rows; after rows were left out of the rollout, sizes differ by at most one.
    """
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    for rows in order.tensor_split(-(-len(order) // config.minibatch_size)):
        yield batch.rows(rows)


def dealt(minibatch: Experience, config: PPOConfig, *, ranks: int) -> list[list[Tensor]]:
    """The rows of each micro-batch of each rank, by length; equally many on every rank: collectives must match.

    With too few rows some are empty.
    """
    response = minibatch.response_mask.sum(-1).cpu()  # [B], waits for the device
    lengths = torch.stack((minibatch.held.num_tokens - response, response), dim=1)
    return deal(pieces_by_length(lengths, config.micro_batch_limit, ranks=ranks), ranks=ranks)


def share_of(minibatch: Experience, config: PPOConfig) -> list[PPOBatch]:
    """This rank's micro-batches, trimmed, with their sequences; every rank must call it."""
    held, first = minibatch.held, torch.zeros(1, dtype=torch.int64)
    shares = dealt(minibatch, config, ranks=held.ranks)
    # A rank without rows gets one with an empty mask: the other ranks' collectives need its forward and backward.
    wanted = [[piece if len(piece) else first for piece in share] for share in shares]
    sequences = fetched(held, [torch.cat(pieces) for pieces in wanted])  # collectives
    batches = []
    places = torch.split(torch.arange(len(sequences.sequences)), [len(piece) for piece in wanted[held.rank]])
    for piece, rows, own in zip(shares[held.rank], wanted[held.rank], places, strict=True):
        batch = PPOBatch.of(sequences.rows(own), minibatch.rows(rows))
        if not len(piece):
            batch = replace(batch, response_mask=torch.zeros_like(batch.response_mask))
        batches.append(batch.trimmed())
    return batches
