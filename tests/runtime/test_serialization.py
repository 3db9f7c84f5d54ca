"""What ranks send each other: comes back as it was, and cannot name code."""

import math
import pickle
import random

import numpy as np
import pytest
import torch

from rlhf.config.run_config import LaunchConfig
from rlhf.engine.checkpoint.checkpoint_state import random_state
from rlhf.runtime.serialization import from_bytes, to_bytes


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -(1 << 80), 0.1, 5e-324, math.inf, "", "\u2028 \ud800 \N{GRINNING FACE}"),
        *([], (), {}, [(), [[]], {}], {3: [1, 2], "3": (None,), (1, 2): {"tensor": ["dict", "tuple"]}}),
    ],
    ids=repr,
)
def test_plain_values_come_back_with_their_types(value):
    found = from_bytes(to_bytes(value))
    assert repr(found) == repr(value)
    assert type(found) is type(value)


def test_tensors_come_back_bit_for_bit():
    bits = torch.randint(0, 256, (7, 16), dtype=torch.uint8)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
    tensors = [bits.view(dtype) for dtype in dtypes]  # among them NaNs of all kinds
    tensors += [bits > 99, torch.tensor(3.0), torch.empty(0, 5), bits[:, ::3].T]
    odd = (tensors, "abc", {"last": torch.ones(1)})  # nothing is aligned
    found, text, rest = from_bytes(to_bytes(odd))
    assert (text, rest["last"].item()) == ("abc", 1.0)
    for one, two in zip(tensors, found, strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert one.contiguous().reshape(-1).view(torch.uint8).equal(two.reshape(-1).view(torch.uint8))
    found[0].zero_()  # memory of its own


def test_random_numbers_can_be_sent():
    random.gauss(), np.random.standard_normal()  # each keeps one for later
    state = random_state(torch.device("cpu"))
    assert from_bytes(to_bytes(state)) == state


@pytest.mark.parametrize("value", [LaunchConfig(), {1, 2}, b"bytes", np.float64(1), print, [object()]])
def test_nothing_else_can_be_sent(value):
    with pytest.raises(TypeError, match="cannot be sent to other ranks"):
        to_bytes(value)


def test_a_pickle_is_no_message():
    with pytest.raises(ValueError, match=r"decode|JSON|Expecting"):
        from_bytes(pickle.dumps({"a": 1}) + bytes(100))
