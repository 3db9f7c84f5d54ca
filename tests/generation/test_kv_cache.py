"""The slots of a cache against plain tensors, and against the cache of transformers."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf.generation.kv_cache import SlotCache, SlotLayer, serves
from tests.models import tiny


def column(slots=3):
    return torch.randn(slots, 2, 1, 4)


def source(length, *, rows=2, window=None):
    """A cache of prompts, as transformers fills it."""
    layer = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
    keys = torch.randn(rows, 2, length, 4)
    layer.update(keys, -keys)
    return layer, keys


@pytest.mark.parametrize("window", [None, 4, 9])
def test_a_slot_layer_holds_what_the_cache_of_transformers_would(window):
    theirs, keys = source(5, rows=3, window=window)
    ours = SlotLayer(3, 12, window=window)
    ours.start(5)
    ours.place(theirs, torch.arange(3), slots=torch.arange(3))
    for _ in range(7):
        new = column()
        sizes, length = theirs.get_mask_sizes(1), theirs.get_seq_length()
        assert (ours.get_mask_sizes(1), ours.get_seq_length()) == (sizes, length)
        expected, found = theirs.update(new, -new), ours.update(new, -new)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_nothing_moves_until_the_buffer_is_full():
    layer = SlotLayer(3, 8)
    layer.start(2)
    layer.place(source(2)[0], torch.tensor([0, 1]), slots=torch.tensor([0, 2]))
    addresses = {layer.update(new := column(), new)[0].data_ptr() for _ in range(6)}
    assert len(addresses) == 1
    layer.trim(3)
    before = layer.keys[:, :, 3:].clone()
    keys, _ = layer.update(new := column(), new)
    assert torch.equal(keys, torch.cat([before, new], 2))


@pytest.mark.parametrize("window", [None, 3])
def test_rows_come_and_go_while_others_stay(window):
    layer = SlotLayer(3, 10, window=window)
    layer.start(4)
    first, _ = source(4, rows=3, window=window)
    layer.place(first, torch.arange(3), slots=torch.arange(3))
    seen = torch.cat([first.keys, new := column()], 2)
    layer.update(new, new)
    second, keys = source(2, rows=2)
    layer.place(second, torch.tensor([1, 1]), slots=torch.tensor([0, 2]))
    found, _ = layer.update(new := column(), new)
    assert torch.equal(found[1], torch.cat([seen, new], 2)[1, :, -found.shape[2] :])
    for slot in (0, 2):
        assert torch.equal(found[slot, :, -3:], torch.cat([keys[1], new[slot]], 1)[:, -3:])
        assert found[slot, :, :-3].eq(0).all()


def test_a_new_row_meets_nothing_of_one_that_diverged():
    layer = SlotLayer(1, 9)
    layer.start(3)
    layer.place(source(3)[0], torch.tensor([0]), slots=torch.tensor([0]))
    layer.update(torch.full((1, 2, 1, 4), torch.nan), torch.full((1, 2, 1, 4), torch.nan))
    layer.place(source(2)[0], torch.tensor([0]), slots=torch.tensor([0]))
    assert layer.update(column(1), column(1))[0].isfinite().all()


def test_slots_leave_and_the_rest_goes_on():
    layer, later = SlotLayer(4, 6), column(2)
    layer.start(3)
    prompts, keys = source(3, rows=4)
    layer.place(prompts, torch.arange(4), slots=torch.arange(4))
    layer.select(torch.tensor([1, 3]))
    found, values = layer.update(later, -later)
    assert torch.equal(found, torch.cat([keys[[1, 3]], later], 2))
    assert torch.equal(values, -found)


def test_more_tokens_than_were_announced_is_our_own_mistake():
    layer = SlotLayer(1, 2)
    layer.start(2)
    layer.place(source(2)[0], torch.tensor([0]), slots=torch.tensor([0]))
    with pytest.raises(AssertionError, match="3 tokens in a cache of 2"):
        layer.update(column(1), column(1))


def test_a_window_bounds_the_memory_of_its_layers():
    layers = SlotCache(tiny.FAMILIES["gemma3"](), slots=2, longest=500, refilled=False).layers
    for layer in layers:
        layer.lazy_initialization(column(), column())
    assert [layer.is_sliding for layer in layers] == [True, False, True]
    assert [layer._buffers[0].shape[2] for layer in layers] == [6 + 32, 500, 6 + 32]


def test_which_models_it_serves():
    assert all(serves(config()) for config in tiny.FAMILIES.values())
    assert not serves(tiny.with_states())
