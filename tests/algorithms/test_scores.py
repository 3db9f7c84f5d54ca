import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from rlhf.algorithms.scores import normalize_scores, penalize_unended

SCORES = tensor([1.0, 3.0, 15.0, -9.0])
ENDED = tensor([True, False, True, False])


def test_normalize_scores_by_hand():
    # The quotients are (1 - 3) / 2, (3 - 3) / 2, (15 - 3) / 2 and (-9 - 3) / 2.
    assert_close(normalize_scores(SCORES, mean=3.0, std=2.0, clamp=None), tensor([-1.0, 0.0, 6.0, -6.0]))
    assert_close(normalize_scores(SCORES, mean=3.0, std=2.0, clamp=5.0), tensor([-1.0, 0.0, 5.0, -5.0]))


def test_a_clamp_of_zero_is_no_clamp():
    assert_close(normalize_scores(SCORES, mean=0.0, std=1.0, clamp=0.0), SCORES)


def test_normalised_scores_have_mean_0_and_std_1():
    scores = 7 + 3 * torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    normalized = normalize_scores(scores, mean=scores.mean().item(), std=scores.std().item(), clamp=None)
    assert normalized.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert normalized.std().item() == pytest.approx(1.0, rel=1e-12)


def test_an_unended_response_is_set_to_minus_the_penalty():
    assert_close(penalize_unended(SCORES, ENDED, penalty=1.0, kind="set"), tensor([1.0, -1.0, 15.0, -1.0]))


def test_an_unended_response_loses_the_penalty():
    assert_close(penalize_unended(SCORES, ENDED, penalty=2.0, kind="subtract"), tensor([1.0, 1.0, 15.0, -11.0]))


def test_a_penalty_of_zero_subtracts_nothing():
    assert_close(penalize_unended(SCORES, ENDED, penalty=0.0, kind="subtract"), SCORES)


@pytest.mark.parametrize("kind", ["set", "subtract"])
def test_bf16_scores_come_back_in_fp32(kind):
    assert penalize_unended(SCORES.bfloat16(), ENDED, penalty=1, kind=kind).dtype == torch.float32
    assert normalize_scores(SCORES.bfloat16(), mean=0.0, std=3.0, clamp=0).dtype == torch.float32


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="std 0.0, expected a positive number"):
        normalize_scores(SCORES, mean=0.0, std=0.0, clamp=None)
    with pytest.raises(ValueError, match="ppo.score.clamp=-1"):
        normalize_scores(SCORES, mean=0.0, std=1.0, clamp=-1)
    with pytest.raises(ValueError, match="ppo.score.missing_eos_penalty=-1"):
        penalize_unended(SCORES, ENDED, penalty=-1, kind="set")
    with pytest.raises(ValueError, match='ppo.score.missing_eos_mode="add"'):
        penalize_unended(SCORES, ENDED, penalty=1, kind="add")
