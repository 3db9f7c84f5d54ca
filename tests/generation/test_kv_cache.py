"""The preallocated cache against plain tensors."""

import pytest
import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from rlhf.generation.kv_cache import PreallocatedLayer, kv_cache
from tests.models import tiny


def test_a_layer_returns_all_it_was_given_without_moving_it():
    layer, parts = PreallocatedLayer(7), [torch.randn(3, 2, length, 4) for length in (4, 1, 2)]
    addresses = set()
    for number, part in enumerate(parts, 1):
        keys, values = layer.update(part, 2 * part)
        addresses.add(keys.data_ptr())
        assert torch.equal(keys, torch.cat(parts[:number], 2))
        assert torch.equal(values, 2 * keys)
        assert layer.get_seq_length() == keys.shape[2]
        assert layer.get_mask_sizes(1) == (keys.shape[2] + 1, 0)
    assert len(addresses) == 1


def test_rows_leave_and_the_rest_goes_on():
    layer, first, later = PreallocatedLayer(6), torch.randn(4, 2, 3, 4), torch.randn(2, 2, 1, 4)
    layer.update(first, -first)
    layer.batch_select_indices(torch.tensor([1, 3]))
    keys, values = layer.update(later, -later)
    assert torch.equal(keys, torch.cat([first[[1, 3]], later], 2))
    assert torch.equal(values, -keys)


def test_more_tokens_than_were_announced_is_our_own_mistake():
    layer = PreallocatedLayer(2)
    with pytest.raises(AssertionError, match="3 tokens in a cache of 2"):
        layer.update(torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1))


def test_layers_with_a_window_keep_their_bounded_cache():
    layers = kv_cache(tiny.FAMILIES["gemma3"](), 20).layers
    assert [type(layer) for layer in layers] == [
        DynamicSlidingWindowLayer,
        PreallocatedLayer,
        DynamicSlidingWindowLayer,
    ]
    assert all(type(layer) is PreallocatedLayer for layer in kv_cache(tiny.FAMILIES["gpt2"](), 20).layers)
