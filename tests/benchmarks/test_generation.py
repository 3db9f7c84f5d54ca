"""Contenders answer the same prompts with equally many tokens, greedily with the same ones, and the table says so."""

import pytest

from benchmarks import generation, generation_run

pytestmark = pytest.mark.usefixtures("forked_contenders")

SMALL = {"rows": 8, "prompts": 16, "prompt": 4, "new": 16, "lengths": "unequal", "draws": "greedy"}


def test_unequal_responses_have_one_long_one_in_each_eight():
    found = generation_run.limits(SMALL)
    assert len(found) == 16
    for group in (found[:8], found[8:]):
        assert sorted(group)[-1] == 16
        assert 1 <= min(group) <= sorted(group)[-2] <= 2
    assert generation_run.limits(SMALL | {"lengths": "equal"}) == [16] * 16


def test_all_contenders_say_the_same_greedily():
    """In fp32; `row` fails where they have not answered with as many tokens as they should."""
    wanted = [SMALL | {"lengths": lengths} for lengths in ("equal", "unequal")]
    contenders = ["floor", "ours", "ours, MKL", "dynamic", "static"]
    found = generation.measure("1M", "fp32", wanted=wanted, rounds=1, contenders=contenders)
    for case, turns in zip(wanted, found, strict=True):
        assert len({str(turns[name][0]["responses"]) for name in contenders[1:]}) == 1
        assert min(own[0]["cpu_seconds"] for own in turns.values()) > 0
        cells = generation.row(case, turns)
        assert cells[:3] == ["8", case["lengths"], "greedy"]
        assert cells[-1] == "100.0%"
        assert "–" not in cells


def test_ranks_answer_gathered_and_sharded():
    case = SMALL | {"lengths": "equal", "draws": "sampled", "new": 3}
    (found,) = generation.measure("1M", "fp32", wanted=[case], rounds=1, contenders=("gathered", "sharded"), ranks=2)
    assert found["gathered"][0]["responses"] == found["sharded"][0]["responses"]
    assert len(found["gathered"][0]["responses"]) == 16


def test_fewer_tokens_are_no_result():
    turns = {name: [{"cpu_seconds": 1.0, "responses": [[1, 2]] * 16}] for name in ("floor", "ours", "dynamic")}
    with pytest.raises(AssertionError, match="32 and 32 tokens, expected "):
        generation.row(SMALL, turns)
