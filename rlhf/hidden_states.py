"""What the frozen layers of a model give for the sequences of a rollout: computed once, used by every pass after it.

The pass of the actor that takes the old log-probabilities keeps them. The reference, where it is the actor without its
adapters, and every epoch of updates begin after these layers. The critic does the same with its own, from the pass that
takes its values on.

For each sequence the states of its real tokens are kept, `[t, D]` in the working type and in host memory, so padding
and minibatches cost nothing. They equal those of another pass up to rounding: a row is computed in one shape of batch.
Left out: reward models and a reference of its own, which pass a rollout once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.engine.engine import Engine
from rlhf.models.padding_free import row_length
from rlhf.runtime.dist import max_over_ranks
from rlhf.types import Responses

log = logging.getLogger(__name__)


class KeptStates:
    """The states of one model for the rows of a rollout, by sample id."""

    def __init__(self, engine: Engine, *, used: bool) -> None:
        """Keep nothing at all unless they are `used`."""
        self._engine, self._layers = engine, engine.frozen_layers if used else None
        self._by_id: dict[int, Tensor] = {}

    @contextmanager
    def kept(self, piece: Any) -> Iterator[None]:
        """The forward inside, of rows `[b, t]` with `sample_ids`, leaves its states here."""
        if self._layers is None:
            yield
            return
        with self._layers.watched() as found:
            yield
        mask = piece.attention_mask
        lengths = mask.sum(-1).tolist()
        # [1, n, D] or [b, t, D] -> [tokens, D]; from a GPU a copy that waits for it
        is_row = self._engine.padding_free and row_length(sum(lengths), mask.numel())
        real = (found[0][0, : sum(lengths)] if is_row else found[0][mask]).cpu()
        rows = torch.split(real, lengths)
        self._by_id |= dict(zip(piece.sample_ids.tolist(), rows, strict=True))

    def reused(self, piece: Any) -> AbstractContextManager[None]:
        """The forward inside, of rows that were kept, begins after the frozen layers."""
        return after_frozen_layers(self._engine, piece, states=self.of(piece.sample_ids))

    def of(self, sample_ids: Tensor) -> tuple[Tensor, ...] | None:
        """The states of rows `[B]`, B of `[t, D]`; None where none are kept."""
        return None if self._layers is None else tuple(self._by_id[row] for row in sample_ids.tolist())


def after_frozen_layers(
    engine: Engine, batch: Responses, *, states: Sequence[Tensor] | None
) -> AbstractContextManager[None]:
    """The forward of `batch` inside begins with the `states` of its B rows; None computes every layer."""
    return nullcontext() if states is None else engine.frozen_layers.replaced_by(_joined(engine, batch, states=states))


def _joined(engine: Engine, batch: Responses, *, states: Sequence[Tensor]) -> Tensor:
    """B states `[t, D]` of real tokens as the blocks of a forward see them, on the batch's device.

    Returns:
        `[1, n, D]` in a forward without padding, otherwise `[B, T, D]`, with 0 for what is no real token.
    """
    mask = batch.attention_mask
    # A row that only keeps ranks in step has lost its response: its states are the first of those kept.
    real = torch.cat([row[:count] for row, count in zip(states, mask.sum(-1).tolist(), strict=True)]).to(mask.device)
    length = row_length(len(real), mask.numel()) if engine.padding_free else 0
    if length:
        return F.pad(real, (0, 0, 0, length - len(real))).unsqueeze(0)  # [tokens, D] -> [1, n, D]
    hidden = real.new_zeros(*mask.shape, real.shape[-1])
    hidden[mask] = real  # [tokens, D] -> [B, T, D]
    return hidden


def may_begin_late(engine: Engine, forward: Callable[[Any, Responses], Tensor], *, name: str) -> bool:
    """Whether a model has frozen layers, and says the same when a forward begins after them, to the last bit.

    Some models do not: later layers may read what earlier ones have left, such as keys and values. So a small batch is
    tried, on every rank. What is decided is logged.

    Args:
        engine: the model.
        forward: calls the module that it is given on a batch.
        name: of the model, for the log.
    """
    layers = engine.frozen_layers
    if not len(layers):
        return False
    with engine.evaluating() as model:
        vocabulary: int = cast(Any, model.config).vocab_size
        batch = _trial(vocabulary, device=engine.world.device)
        with layers.watched() as found:
            expected = forward(model, batch)
        try:
            with layers.replaced_by(found[0]):
                differs = not torch.equal(forward(model, batch), expected)
        except Exception as error:  # of whatever kind the model's code raises: it needs what was left out
            differs = True
            log.debug("%s without its first layers", name, exc_info=error)
    differs = bool(max_over_ranks(torch.tensor(int(differs), device=engine.world.device)))  # all ranks do the same
    outcome = "but later ones need more than their output, so" if differs else "and"
    passes = "in every pass" if differs else "once for a rollout"
    log.info("%s: the first %d layers are frozen, %s computed %s", name, len(layers), outcome, passes)
    return not differs


def _trial(vocabulary: int, *, device: torch.device) -> Responses:
    """Two short sequences of different tokens, one of them with padding."""
    tokens = torch.arange(16, device=device).view(2, 8) % vocabulary
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :2] = False
    return Responses(sequences=tokens, attention_mask=mask, response_mask=mask[:, 4:])
