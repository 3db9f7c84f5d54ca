"""The first layers of a model, if none of them learns: their output can be kept, and a forward can begin after them.

Adapters on the last layers alone (`lora.top_layers`) leave such layers below. For the same tokens they say the same
with the adapters switched on or off, before an update and after it.
See also: what is kept for a rollout, and whether a model may be cut in two (`rlhf/hidden_states.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rlhf.engine.sharding import Sharding


class FrozenLayers:
    """The blocks of a model below the first one that learns, and the embedding before them."""

    def __init__(self, blocks: Sequence[nn.Module], sharding: Sharding) -> None:
        """Take the first blocks of the model that `sharding` has spread."""
        self._blocks, self._sharding = blocks, sharding
        self._others = -1  # what a block returns beside hidden states, in a tuple; -1 where it returns them bare

    def __len__(self) -> int:
        return len(self._blocks)

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """Inside, each forward appends the hidden states that leave these layers, `[b, t, D]` in the working type.

        `[1, n, D]` in a forward without padding (`rlhf/models/padding_free.py`).
        """
        found: list[Tensor] = []

        def look(*hooked: Any) -> None:
            output = hooked[-1]  # after the block and its inputs
            is_bare = isinstance(output, Tensor)
            self._others = -1 if is_bare else len(output) - 1
            found.append(output if is_bare else output[0])

        handle = self._blocks[-1].register_forward_hook(look)
        try:
            yield found
        finally:
            handle.remove()

    @contextmanager
    def replaced_by(self, hidden: Tensor) -> Iterator[None]:
        """Inside, a forward computes none of these layers and goes on from `hidden`.

        The embedding is still looked up, for families whose later layers read it. Activation checkpointing recomputes
        none of these layers either. Every rank must come here or none.

        Args:
            hidden: what they gave for the tokens of the forward, in the shape that it has there.
        """
        output = hidden if self._others < 0 else (hidden, *(None,) * self._others)
        with self._sharding.leaving_out(self._blocks):
            try:
                for block in self._blocks:
                    vars(block)["forward"] = lambda *_, **__: output
                yield
            finally:
                for block in self._blocks:
                    del vars(block)["forward"]
