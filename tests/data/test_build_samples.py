"""DeepSpeed-Chat's split between stages, held-out rows, and weights."""

import numpy as np
import pytest

from data.build_samples import hold_out, rows_of_stage, weighted

SHARES = [2, 4, 4]


def legacy_shuffle(size, seed):
    """Fisher-Yates as `numpy.random.RandomState.shuffle` does it: masked rejection on 32-bit draws."""
    generator, order = np.random.RandomState(seed), list(range(size))
    for last in range(size - 1, 0, -1):
        mask = (1 << last.bit_length()) - 1
        draw = int(generator.randint(0, 2**32, dtype=np.uint32)) & mask
        while draw > last:
            draw = int(generator.randint(0, 2**32, dtype=np.uint32)) & mask
        order[last], order[draw] = order[draw], order[last]
    return order


def test_the_permutation_is_that_of_deepspeed_chat():
    for size, seed in ((1, 0), (10, 1234), (137, 7)):
        everything = rows_of_stage(size, [1, 0, 0], position=0, seed=seed)
        assert everything.tolist() == legacy_shuffle(size, seed)


@pytest.mark.parametrize(
    ("num_rows", "shares", "sizes"),
    [
        (10, SHARES, [2, 4, 4]),
        # 2.2, 4.4, 4.4 round to 2, 4, 4: one short, so all boundaries move up by one
        (11, SHARES, [3, 4, 4]),
        # 2.6, 5.2, 5.2 round to 3, 5, 5 = 13
        (13, SHARES, [3, 5, 5]),
        # 0.8, 1.6, 1.6 round to 1, 2, 2: one too many, so all boundaries move down by one
        (4, SHARES, [0, 2, 2]),
        # 0.2, 0.4, 0.4 round to nothing: the boundaries move up and the first stage gets the only row
        (1, SHARES, [1, 0, 0]),
        # halves round to even: 0.5 and 0.5 to 0, so the first gets it
        (1, [5, 5, 0], [1, 0, 0]),
        # 1.5, 1.5 round to 2, 2
        (3, [5, 5, 0], [1, 2, 0]),
        (1000, [0.2, 0.4, 0.4], [200, 400, 400]),
        (7, [10, 0, 0], [7, 0, 0]),
    ],
)
def test_boundaries_are_rounded_and_moved_as_in_deepspeed_chat(num_rows, shares, sizes):
    parts = [rows_of_stage(num_rows, shares, position=position, seed=1234) for position in range(3)]
    assert [len(part) for part in parts] == sizes
    assert np.concatenate(parts).tolist() == legacy_shuffle(num_rows, 1234)


def test_a_boundary_below_zero_gives_no_row_to_two_stages():
    # 0, 1.5, 1.5 round to 0, 2, 2: boundaries 0, 2, 4 move down to -1, 1, 3
    parts = [rows_of_stage(3, [0, 5, 5], position=position, seed=1).tolist() for position in range(3)]
    assert [len(part) for part in parts] == [0, 1, 2]
    assert sorted(sum(parts, [])) == [0, 1, 2]


def test_without_shares_every_stage_has_all_rows_in_order():
    assert [rows_of_stage(4, [], position=position, seed=1).tolist() for position in range(3)] == [[0, 1, 2, 3]] * 3


def test_held_out_rows_are_a_fixed_share_and_nothing_is_lost():
    rows = np.arange(100, 200)
    train, held_out = hold_out(rows, 0.05, seed=3)
    assert (len(train), len(held_out)) == (95, 5)
    assert sorted([*train, *held_out]) == rows.tolist()
    assert train.tolist() == sorted(train)
    assert hold_out(np.arange(100), 0.05, seed=3)[1].tolist() == (held_out - 100).tolist()
    assert hold_out(rows, 0.05, seed=4)[1].tolist() != held_out.tolist()


@pytest.mark.parametrize(
    ("num_rows", "fraction", "held"),
    [(100, 0.0, 0), (3, 0.01, 1), (1, 0.5, 0), (2, 0.99, 1), (0, 0.5, 0), (10, 0.25, 2)],
)
def test_at_least_one_row_is_held_out_and_one_is_left(num_rows, fraction, held):
    train, held_out = hold_out(np.arange(num_rows), fraction, seed=0)
    assert (len(train), len(held_out)) == (num_rows - held, held)


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0, 2.5])
def test_a_weight_says_how_often_rows_are_used(weight):
    rows = np.arange(10, 30)
    used = weighted(rows, weight, seed=5).tolist()
    assert len(used) == 20 * weight
    assert {used.count(row) for row in rows} <= {int(weight), int(weight) + (weight % 1 > 0)}
    assert weighted(rows, weight, seed=5).tolist() == used


def test_a_larger_fraction_contains_a_smaller_one_and_keeps_the_order():
    rows = np.arange(50)[::-1]
    small, large = (weighted(rows, weight, seed=5).tolist() for weight in (0.2, 0.6))
    assert (len(small), len(large)) == (10, 30)
    assert set(small) < set(large)
    assert large == sorted(large, reverse=True)


@pytest.mark.parametrize("weight", [0, -1, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(ValueError, match="expected a positive number"):
        weighted(np.arange(5), weight, seed=0)


def test_a_weight_that_leaves_no_row_is_refused():
    with pytest.raises(ValueError, match="less than one of 5 rows; expected at least 0.2"):
        weighted(np.arange(5), 0.01, seed=0)
