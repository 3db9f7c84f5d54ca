"""The factor on the loss that keeps fp16 gradients from vanishing (Micikevicius et al. 2018), fixed or adaptive.

Models that are trained together (actor and critic) share one, so that they skip the same steps. In other precisions
the factor is always 1. The rules are those of DeepSpeed's dynamic loss scaler.
See also: how an overflow is noticed (`engine.step_together`).
"""

from __future__ import annotations

import logging
from typing import Any

from rlhf.config.engine_config import EngineConfig, Precision

logger = logging.getLogger(__name__)

_FACTOR = 2.0
_STATE = ("value", "_patience", "_steps", "_last_overflow", "_has_settled")
_SETTLED = 10  # good steps in a row; fewer may be luck: a factor on the verge fits some batches and not the next


class LossScale:
    """What the loss is multiplied by before backward, and gradients are divided by before the step."""

    def __init__(self, config: EngineConfig) -> None:
        """Start as an engine with these settings does."""
        is_fp16 = config.precision == Precision.fp16
        self.value = (config.loss_scale or 2.0**config.initial_scale_power) if is_fp16 else 1.0
        self._adapts = is_fp16 and config.loss_scale == 0
        self._window = config.loss_scale_window  # good steps after which the next good one doubles the factor
        self._hysteresis = config.hysteresis
        self._consecutive = config.consecutive_hysteresis
        self._minimum = config.min_loss_scale
        self._patience = config.hysteresis  # overflows left until one halves the factor
        self._steps = 0
        self._last_overflow = -1
        self._has_settled = False  # no overflow for `_SETTLED` steps, since the start or since the factor last doubled

    @property
    def can_fall(self) -> bool:
        """Whether an overflow can be remedied by a lower factor; if not, something else is wrong."""
        return self._adapts and self.value > self._minimum

    @property
    def is_searching(self) -> bool:
        """Whether an overflow is normal, because the factor is still being found, at the start and after it doubled."""
        return self.can_fall and not self._has_settled

    @property
    def is_used(self) -> bool:
        """Whether there is a factor at all, which there is in fp16 only."""
        return self._adapts or self.value != 1

    @property
    def limit(self) -> str:
        """Why the factor cannot fall, as the end of a sentence; empty where there is no factor."""
        why = "the lowest (engine.min_loss_scale)" if self._adapts else "which engine.loss_scale fixes (0 adapts it)"
        return f", at a loss scale of {self.value:.17g}, {why}" if self.is_used else ""

    def update(self, *, overflow: bool) -> None:
        """Count a step and set the factor of the next; on all ranks alike, since all agree on `overflow`."""
        tried, could_fall, was_searching = self.value, self.can_fall, self.is_searching  # as they were in the step
        if self._adapts:
            self._shrink() if overflow else self._grow()
        self._steps += 1
        if overflow and could_fall:
            self._report(tried, is_normal=was_searching)

    def _report(self, tried: float, *, is_normal: bool) -> None:
        following = "it again" if self.value == tried else f"{self.value:.17g}"
        found = f"fp16: the loss scale {tried:.17g} overflowed; trying {following} (step skipped"
        if is_normal:
            logger.info("%s; normal at the start, and after the scale has grown)", found)
        else:
            logger.warning("%s, after many that fitted). If it goes on, lower the learning rate.", found)

    def _shrink(self) -> None:
        self._last_overflow = self._steps
        if self._patience > 1:
            self._patience -= 1  # tolerate this one: one batch may be an outlier
        else:
            # Patience is restored in `_grow` alone: until then every overflow halves the factor.
            self.value = max(self.value / _FACTOR, self._minimum)

    def _grow(self) -> None:
        good_before = self._steps - self._last_overflow - 1  # good steps in a row, this one not counted
        is_due = good_before > 0 and good_before % self._window == 0
        # Counted from the last time that the factor doubled, after which it has to prove itself again.
        self._has_settled |= good_before % self._window >= _SETTLED
        if is_due or self._consecutive:
            self._patience = self._hysteresis
        if is_due:
            self.value *= _FACTOR
            self._has_settled = False

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as JSON."""
        return {name.removeprefix("_"): getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for name in _STATE:
            setattr(self, name, state[name.removeprefix("_")])
