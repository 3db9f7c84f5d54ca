"""The factor on the loss that keeps fp16 gradients from vanishing (Micikevicius et al. 2018), fixed or adaptive.

Models that are trained together (actor and critic) share one, so that they skip the same steps. With other precisions
the factor is 1 and stays. The rules are those of DeepSpeed's dynamic loss scaler.
Left out: noticing an overflow (`learner.py`).
"""

from __future__ import annotations

from typing import Any

from rlhf.config import EngineConfig, Precision

_FACTOR = 2.0


class LossScale:
    """What the loss is multiplied by before backward, and gradients are divided by before the step."""

    def __init__(
        self,
        value: float = 1.0,
        *,
        adapts: bool = False,
        window: int = 1000,
        hysteresis: int = 2,
        consecutive: bool = False,
        minimum: float = 1.0,
    ) -> None:
        """Start at `value`.

        Args:
            value: the factor.
            adapts: False keeps it.
            window: good steps after which the next good one doubles it.
            hysteresis: the overflow, counted since it last doubled, from which on each halves it.
            consecutive: forget overflows after every good step, not only when the factor doubles.
            minimum: it does not fall below this.
        """
        self.value = value
        self._adapts = adapts
        self._window = window
        self._hysteresis = hysteresis
        self._consecutive = consecutive
        self._minimum = minimum
        self._patience = hysteresis  # overflows left until one halves the factor
        self._steps = 0
        self._last_overflow = -1

    @classmethod
    def of(cls, config: EngineConfig) -> LossScale:
        """The factor that an engine's settings ask for."""
        if config.precision != Precision.fp16:
            return cls()
        return cls(
            config.loss_scale or 2.0**config.initial_scale_power,
            adapts=config.loss_scale == 0,
            window=config.loss_scale_window,
            hysteresis=config.hysteresis,
            consecutive=config.consecutive_hysteresis,
            minimum=config.min_loss_scale,
        )

    @property
    def can_fall(self) -> bool:
        """Whether an overflow has a remedy; where not, something else is wrong."""
        return self._adapts and self.value > self._minimum

    def update(self, *, overflow: bool) -> None:
        """Count a step, and change the factor for the next."""
        if self._adapts:
            self._shrink() if overflow else self._grow()
        self._steps += 1

    def _shrink(self) -> None:
        self._last_overflow = self._steps
        if self._patience > 1:
            self._patience -= 1
        else:
            self.value = max(self.value / _FACTOR, self._minimum)

    def _grow(self) -> None:
        good_before = self._steps - self._last_overflow - 1
        is_due = good_before > 0 and good_before % self._window == 0
        if is_due or self._consecutive:
            self._patience = self._hysteresis
        if is_due:
            self.value *= _FACTOR

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "value": self.value,
            "patience": self._patience,
            "steps": self._steps,
            "last_overflow": self._last_overflow,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.value = state["value"]
        self._patience = state["patience"]
        self._steps = state["steps"]
        self._last_overflow = state["last_overflow"]
