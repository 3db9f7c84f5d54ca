"""Ours runs to the end of a turn, and the table compares within rounds."""

import pytest

from benchmarks import ppo_iteration

pytestmark = pytest.mark.usefixtures("forked_contenders")


def turn(*seconds, tokens=64):
    return dict(zip(ppo_iteration.PHASES, seconds, strict=True)) | {"tokens": tokens}


def test_an_iteration_of_ours_has_all_phases_and_full_responses():
    case = {"rows": 4, "prompt": 4, "new": 3, "epochs": 1}
    (found,) = ppo_iteration.measure("1M", case, rounds=1, peer=None)["ours"]
    assert found.pop("tokens") == 12
    assert set(found) == set(ppo_iteration.PHASES)
    assert min(found.values()) > 0


def test_ratios_are_taken_within_a_round():
    """In all 6 and 12 s against 12 and 36: ratios 2 and 3, the median 2.5."""
    found = {"ours": [turn(1, 2, 3), turn(2, 4, 6)], "trl": [turn(4, 4, 4), turn(2, 4, 30)]}
    text = ppo_iteration.compared(found)
    assert "| all | 9.000 (6.000–12.000) | 24.000 (12.000–36.000) | 2.50 (2.00–3.00) |" in text
    assert "| generate | 1.500 (1.000–2.000) | 3.000 (2.000–4.000) | 2.50 (1.00–4.00) |" in text
    assert "| all | 6.000 | – | – |" in ppo_iteration.compared({"ours": found["ours"][:1]})


def test_responses_of_other_lengths_are_no_comparison():
    found = {"ours": [turn(1, 1, 1)], "trl": [turn(1, 1, 1, tokens=60)]}
    with pytest.raises(AssertionError, match="responses of different lengths"):
        ppo_iteration.compared(found)
