"""The random numbers that come next, of every generator that a stage might draw from, as plain JSON.

Left out: generators made from a seed where they are used (sampling, shuffling, new weights), which need no state.
"""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_random_numbers(seed: int, *, rank: int) -> None:
    """Begin the random numbers of a stage: they follow from its seed and rank, not from what the process did before.

    Only torch's are drawn from (dropout), on the device too.
    """
    torch.manual_seed(seed * 1_000_003 + rank)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of python's, numpy's and torch's generators, and on CUDA of this rank's device."""
    version, numbers, gauss = random.getstate()
    twister = np.random.get_state(legacy=False)
    assert isinstance(twister, dict)
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": twister | {"state": {"key": twister["state"]["key"].tolist(), "pos": twister["state"]["pos"]}},
        "torch": _text(torch.get_rng_state()),
    }
    if device.type == "cuda":
        state["cuda"] = _text(torch.cuda.get_rng_state(device))
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on with the numbers that follow `random_state`; a state from a CPU leaves CUDA's generator as it is."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    twister = state["numpy"]["state"]
    key = np.array(twister["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"] | {"state": {"key": key, "pos": twister["pos"]}})
    torch.set_rng_state(_tensor(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
