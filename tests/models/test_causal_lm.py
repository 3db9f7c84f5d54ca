import torch

from rlhf.models.causal_lm import position_ids


def test_positions_count_real_tokens_on_either_side_of_the_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 1, 2, 3, 4]]
    assert position_ids(mask.bool()).tolist() == position_ids(mask).tolist()
