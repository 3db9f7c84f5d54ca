"""Every row once, within the limits, as few and as even micro-batches as can be, equally many on every rank."""

import itertools
import random

import pytest
import torch

from rlhf.config.bounds import MicroBatchLimit
from rlhf.forward_passes import agreed_pieces
from rlhf.micro_batches import deal, padded_tokens, pieces_by_length
from rlhf.runtime import dist
from rlhf.types import Responses
from tests.ranks import run_on_ranks


@pytest.fixture(autouse=True)
def widths(monkeypatch):
    """Rows are not rounded up, so that limits of few tokens say something."""
    monkeypatch.setattr("rlhf.types.WIDTHS", 1)


def test_columns_that_round_a_width_up_count(monkeypatch):
    monkeypatch.setattr("rlhf.types.WIDTHS", 8)
    pieces = pieces_by_length(torch.tensor([9, 9, 9, 9]), MicroBatchLimit(8, 32))
    assert list(map(len, pieces)) == [2, 2]  # of 16 columns each; three of 9 would be 27 tokens


def lengths_of(seed, count, longest=40):
    draw = random.Random(seed)
    return torch.tensor([draw.randint(1, longest) for _ in range(count)])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("limit", [(5, 60), (100, 33), (3, None), (7, 1)])
def test_every_row_is_in_one_micro_batch_within_the_limits(parts, ranks, limit):
    limit = MicroBatchLimit(*limit)
    for seed in range(20):
        count = 1 + seed
        lengths = torch.stack([lengths_of(seed * 7 + part, count) for part in range(parts)], dim=1)
        pieces = pieces_by_length(lengths, limit, ranks=ranks)
        assert sorted(torch.cat(pieces).tolist()) == list(range(count))
        assert len(pieces) % ranks == 0
        for piece in pieces:
            # rows x the width to which they are padded, part by part
            tokens = len(piece) * sum(int(lengths[piece, part].max()) for part in range(parts)) if len(piece) else 0
            assert tokens == padded_tokens(lengths[piece])
            assert len(piece) <= limit.rows
            assert limit.tokens is None or tokens <= limit.tokens or len(piece) == 1


def fewest(lengths, limit):
    """Fewest pieces, and the smallest most of tokens with so many, of all ways to cut the sorted rows."""
    rows = sorted(lengths, reverse=True)
    found = []
    for cuts in itertools.product((False, True), repeat=len(rows) - 1):
        places = [0, *(place for place, cut in enumerate(cuts, start=1) if cut), len(rows)]
        sizes = [(rows[start], end - start) for start, end in itertools.pairwise(places)]
        if all(size == 1 or (size <= limit.rows and size * width <= limit.tokens) for width, size in sizes):
            found.append((len(sizes), max(size * width for width, size in sizes)))
    return min(found)


@pytest.mark.parametrize("limit", [MicroBatchLimit(4, 60), MicroBatchLimit(9, 100)])
def test_no_other_cut_is_shorter_or_more_even(limit):
    for seed in range(15):
        lengths = lengths_of(seed, 9)
        pieces = pieces_by_length(lengths, limit)
        assert (len(pieces), max(padded_tokens(lengths[piece, None]) for piece in pieces)) == fewest(
            lengths.tolist(), limit
        )


def test_a_row_longer_than_the_limit_is_alone():
    pieces = pieces_by_length(torch.tensor([3, 90, 3, 2, 70]), MicroBatchLimit(8, 12))
    assert [piece.tolist() for piece in pieces] == [[1], [4], [0, 2, 3]]


def test_ranks_have_nearly_the_same_tokens_in_every_turn_and_in_total():
    for ranks, seed in itertools.product((2, 4), range(5)):
        lengths = lengths_of(seed, 128, longest=256)
        shares = deal(pieces_by_length(lengths, MicroBatchLimit(64, 1024), ranks=ranks), ranks=ranks)
        tokens = torch.tensor([[padded_tokens(lengths[piece, None]) for piece in share] for share in shares])
        even = int(tokens.sum()) / ranks
        assert tokens.sum(1).max() <= 1.05 * even
        assert tokens.max(0).values.sum() <= 1.07 * even  # what they take if they wait for each other in every turn


def test_with_fewer_rows_than_ranks_some_have_none():
    pieces = pieces_by_length(torch.tensor([4, 5, 6]), MicroBatchLimit(8, 100), ranks=4)
    assert [len(piece) for piece in pieces] == [1, 1, 1, 0]


def scored(limit):
    """On a rank with short rows, on the other one with long ones: the pieces of a scoring pass."""
    world = dist.start("cpu")
    lengths = torch.tensor([2, 2, 3, 2, 2, 2] if world.rank else [9, 3, 10, 8, 10, 2])
    prompt = torch.ones(6, 4, dtype=torch.bool)
    response = torch.arange(10) < lengths[:, None]
    mask = torch.cat([prompt, response], dim=1)
    return agreed_pieces(Responses(mask.long(), mask, response_mask=response), limit)


def test_ranks_agree_on_the_number_of_scoring_passes():
    long, short = run_on_ranks(scored, 2, MicroBatchLimit(6, 30))
    assert len(long) == len(short) > 2
    for pieces in (long, short):
        assert sorted(torch.cat(pieces).tolist()) == list(range(6))
        assert all(len(piece) for piece in pieces)  # a forward of none would not be a forward
