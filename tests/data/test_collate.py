"""Padding: sides, masks, and a pad token that is the EOS."""

import numpy as np
import torch

from data.collate import collate_demonstrations, collate_preferences, collate_prompts
from data.samples import Demonstration, Preference, Prompt

PAD = 9


def ids(*values):
    return np.array(values, dtype=np.int32)


def test_demonstrations_are_padded_on_the_right():
    samples = [
        Demonstration(ids(1, 2, 3), np.array([False, True, True])),
        Demonstration(ids(4, 5), np.array([False, True])),
    ]
    batch = collate_demonstrations(samples, PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, PAD]]
    assert batch.attention_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.target_mask.tolist() == [[False, True, True], [False, True, False]]
    assert (batch.input_ids.dtype, batch.attention_mask.dtype) == (torch.int64, torch.bool)


def test_a_pad_token_that_is_the_eos_hides_no_token():
    eos = PAD
    batch = collate_demonstrations(
        [
            Demonstration(ids(eos, 5, eos), np.array([False, True, True])),
            Demonstration(ids(1, 2, 3, eos), np.array([False, True, True, True])),
        ],
        eos,
    )
    assert batch.attention_mask.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.target_mask.tolist() == [[False, True, True, False], [False, True, True, True]]


def test_preferences_are_all_chosen_then_all_rejected():
    batch = collate_preferences(
        [Preference(ids(1, 2), ids(1, 3, 4), margin=0.5), Preference(ids(5), ids(6), margin=0.0)], PAD
    )
    assert batch.input_ids.tolist() == [[1, 2, PAD], [5, PAD, PAD], [1, 3, 4], [6, PAD, PAD]]
    assert batch.attention_mask.sum(-1).tolist() == [2, 1, 3, 1]
    assert batch.margin.tolist() == [0.5, 0.0]
    assert batch.margin.dtype == torch.float32


def test_prompts_are_padded_on_the_left():
    batch = collate_prompts([Prompt(ids(1, 2, 3), "abc"), Prompt(ids(4), "d")], [70, 71], pad_id=PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3], [PAD, PAD, 4]]
    assert batch.attention_mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.sample_ids.tolist() == [70, 71]
    assert batch.prompts == ("abc", "d")


def test_rows_of_equal_length_are_not_padded():
    batch = collate_prompts([Prompt(ids(1, 2), "a"), Prompt(ids(3, 4), "b")], [0, 1], pad_id=PAD)
    assert batch.attention_mask.all()
    assert batch.input_ids.shape == (2, 2)
