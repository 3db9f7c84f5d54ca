"""Saves and restores, as plain JSON, every random generator that a stage might draw from.

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
    """Seed the random numbers of a stage, so that they do not depend on what the process did before.

    Only torch's are drawn from (dropout), on the device too.
    """
    torch.manual_seed(seed * 1_000_003 + rank)  # also CUDA's; another number for every pair of seed and rank


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, and on CUDA that of this rank's device."""
    version, numbers, gauss = random.getstate()
    twister = np.random.get_state(legacy=False)  # a dictionary, with an array inside
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
    """Continue with the numbers after `random_state`; a state from a CPU does not change CUDA's generator."""
    version, numbers, gauss = state["python"]
    # JSON has made lists of the tuples, which `setstate` does not take.
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
    # A bytearray, because torch warns about memory that it may not write to.
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
