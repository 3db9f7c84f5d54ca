"""Attention of one query beside that of transformers, call by call and through models that decode."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.generation.kv_cache import cache_argument
from rlhf.models import cpu_attention
from rlhf.models.cpu_attention import speed_up_attention
from tests.models import tiny

PLAIN = cpu_attention._sdpa, cpu_attention._sdpa_mask


@pytest.fixture(autouse=True)
def registered():
    speed_up_attention()
    yield
    ALL_ATTENTION_FUNCTIONS.register("sdpa", PLAIN[0])
    ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", PLAIN[1])


def by_hand(query, key, value, visible):
    """In fp64, with keys repeated for the queries of a group."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = (query.double() @ key.transpose(2, 3)) * 0.3
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_query_is_answered_as_by_hand(dtype, heads, masked):
    torch.manual_seed(0)
    query = torch.randn(3, heads, 1, 8).to(dtype)
    buffers = torch.randn(2, 3, 2, 20, 8).to(dtype)
    key, value = buffers[:, :, :, 4:15]  # a view, as a cache returns it
    visible = torch.arange(11) >= torch.tensor([0, 3, 10])[:, None, None, None]
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf) if masked else None
    module = SimpleNamespace(num_key_value_groups=heads // 2, is_causal=True)
    with torch.no_grad():
        found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=0.3)
    expected = by_hand(query, key, value, visible if masked else torch.ones_like(visible))
    assert found.shape == (3, 1, heads, 8)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype is torch.float32 else 5e-3)


def kernel_calls(monkeypatch):
    """Queries and masks of every call of the kernel."""
    calls, kernel = [], F.scaled_dot_product_attention

    def counted(query, *args, attn_mask=None, enable_gqa=False, **kwargs):
        calls.append((tuple(query.shape), attn_mask, enable_gqa))
        return kernel(query, *args, attn_mask=attn_mask, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[5, 5], [5, 3]])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_model_decodes_as_with_the_attention_of_transformers(family, lengths, dtype, monkeypatch):
    model = tiny.model(family).to(dtype)
    ids, mask = tiny.padded(lengths, side="left")
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    argument = cache_argument(model)

    def last():
        with torch.no_grad():
            read = model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1])
            calls.clear()
            words = {"attention_mask": mask, "position_ids": positions[:, -1:], argument: getattr(read, argument)}
            return model(ids[:, -1:], **words).logits.float()

    calls = kernel_calls(monkeypatch)
    found, own = last(), list(calls)
    monkeypatch.setattr(cpu_attention, "_attention", PLAIN[0])
    monkeypatch.setattr(cpu_attention, "_mask", PLAIN[1])
    speed_up_attention()
    expected = last()
    assert (found - expected).norm() <= (1e-5 if dtype is torch.float32 else 1e-2) * expected.norm()
    assert len(own) == len(calls)
    for shape, seen, shares_keys in own:  # two queries are a group, or one and its double
        assert shape[2] == (1 if family in ("gpt2", "opt") and dtype is torch.float32 else 2)
        assert not shares_keys
        assert seen is None or seen.dtype is dtype


def test_what_trains_or_reads_a_prompt_is_left_to_transformers(monkeypatch):
    calls = kernel_calls(monkeypatch)
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    query, key = torch.randn(2, 4, 1, 8, dtype=torch.bfloat16), torch.randn(2, 4, 5, 8, dtype=torch.bfloat16)
    ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, key, None)
    with torch.no_grad():
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, query.repeat(1, 1, 3, 1), key, key, None)
    assert [shape[2] for shape, *_ in calls] == [1, 3]
    words = {"batch_size": 2, "kv_length": 4, "attention_mask": torch.arange(8).view(2, 4) > 0, "dtype": torch.bfloat16}
    make = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    assert make(q_length=4, **words).dtype is torch.bool
    one = make(q_length=1, q_offset=3, **words)
    assert one.flatten(1).tolist() == [[-torch.inf, 0, 0, 0], [0, 0, 0, 0]]
