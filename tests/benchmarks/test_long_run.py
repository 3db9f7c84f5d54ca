"""A rank notes what it holds, and what grows is found."""

import pytest

from benchmarks import long_run
from benchmarks.long_run import CASES, growth, measure, report

pytestmark = pytest.mark.usefixtures("forked_contenders")


def readings(values, name="threads"):
    return [{"step": 10.0 * number, name: float(value)} for number, value in enumerate(values, start=1)]


def test_a_run_is_read_half_way_between_multiples_of_steps():
    (rank,) = measure(CASES[0], iterations=4, every=2)
    assert [reading.pop("step") for reading in rank] == [1, 3]
    assert set(rank[0]) == {"own memory, MB", "shared memory, MB", "open files", "threads", "objects", "tensors"}
    assert rank[0].pop("shared memory, MB") >= 0
    assert min(rank[0].values()) > 0


def test_growth_is_that_of_the_rank_that_grows_most_after_it_has_settled():
    """From iteration 50 on: 0 1 2 ... 9 a reading, so 0.1 an iteration; medians 1.5 and 7.5. The other rank is flat."""
    flat, rising = readings([9, 9, 9, 9, *[4] * 10]), readings([9, 9, 9, 9, *range(10)])
    found = growth([flat, rising], "threads")
    assert found[:2] == (1.5, 7.5)
    assert found.slope == pytest.approx(0.1)
    assert growth([flat, flat], "threads") == (4, 4, 0)


@pytest.mark.parametrize(
    ("name", "more", "verdict"),
    [("threads", 1, "grows"), ("threads", 0, "flat"), ("own memory, MB", 3, "flat"), ("own memory, MB", 9, "grows")],
)
def test_each_value_has_a_limit(name, more, verdict):
    text = report([readings([5] * 8 + [5 + more] * 8, name)])
    assert verdict in text.splitlines()[-1]
    assert f"| {name} | 5" in text


def test_readings_do_not_fall_together_with_checkpoints():
    for case in CASES:
        if "checkpoint.every=" in case.settings:
            every = int(case.settings.partition("checkpoint.every=")[2].split()[0])
            assert every % long_run.EVERY == 0
