"""AdamW on the rows that a rank holds, with fp32 master weights, a group of parameters at a time.

A group's state is an object of its own, which a step loads, changes and stores: the state need not live where the
parameters do. Left out: other homes for the state, gradient norms, and the learning rate's schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlhf.config import OptimizerConfig
from rlhf.engine.sharding import ParameterGroup, like, local


@dataclass
class AdamState:
    """What AdamW keeps of a group: local rows by parameter name, all fp32."""

    masters: dict[str, Tensor]  # empty where the parameters are fp32 themselves
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    steps: dict[str, Tensor]  # [] each: updates so far, for the bias correction


class StateHome(Protocol):
    """Where the state of one group rests between steps."""

    def load(self) -> AdamState:
        """The state, on the parameters' device."""

    def store(self, state: AdamState) -> None:
        """Take the changed state back."""


class Resident:
    """A home on the parameters' device: nothing moves."""

    def __init__(self, state: AdamState) -> None:
        self._state = state

    def load(self) -> AdamState:
        """The state itself."""
        return self._state

    def store(self, state: AdamState) -> None:
        """Nothing to do: the state was changed in place."""
        self._state = state


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), none of it on biases and norms."""

    def __init__(self, groups: list[ParameterGroup], masters: Mapping[str, Tensor], *, config: OptimizerConfig) -> None:
        """Start at zero moments.

        Args:
            groups: the parameters that learn, in the order of the forward pass.
            masters: local rows of their fp32 master weights; empty where the parameters are fp32.
            config: learning rate and schedule in it are not used here.
        """
        self.groups = groups
        self.homes: list[StateHome] = [Resident(_zero_state(group, masters)) for group in groups]
        self._config = config

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], *, lr: float, scale: float = 1.0) -> None:
        """Update the parameters that have a gradient; their working weights follow their masters.

        Args:
            gradients: local rows of fp32 gradients, by parameter name.
            lr: learning rate.
            scale: factor on every gradient, applied on the way.
        """
        for group, home in zip(self.groups, self.homes, strict=True):
            names = [name for name in group if name in gradients]
            state = home.load()
            if names:
                torch._foreach_add_([state.steps[name] for name in names], 1)
            matrices = [name for name in names if group[name].ndim >= 2]
            vectors = [name for name in names if group[name].ndim < 2]
            for part, decay in ((matrices, self._config.weight_decay), (vectors, 0.0)):
                self._update(_Rows(group, state, gradients, part), lr=lr, decay=decay, scale=scale)
            _publish(group, state)
            home.store(state)

    def _update(self, rows: _Rows, *, lr: float, decay: float, scale: float) -> None:
        if not rows.weights:
            return
        beta1, beta2 = self._config.betas
        divisor = None if scale == 1 else torch.full((), 1 / scale, device=rows.weights[0].device)
        torch._fused_adamw_(
            rows.weights,
            rows.gradients,
            rows.exp_avg,
            rows.exp_avg_sq,
            [],
            rows.steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=decay,
            eps=self._config.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
        )

    def masters(self) -> dict[str, Tensor]:
        """The fp32 weights by parameter name, sharded as the parameters are."""
        return {name: entry["weight"] for name, entry in self.state_dict().items()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a resumed run needs, by parameter name, sharded as the parameters are.

        The tensors share the optimizer's memory where the state is resident, so they can be filled in place.
        """
        entries: dict[str, dict[str, Tensor]] = {}
        for group, home in zip(self.groups, self.homes, strict=True):
            state = home.load()
            for name, parameter in group.items():
                entries[name] = {
                    "weight": like(parameter, state.masters[name]) if state.masters else parameter.detach(),
                    "exp_avg": like(parameter, state.exp_avg[name]),
                    "exp_avg_sq": like(parameter, state.exp_avg_sq[name]),
                    "step": state.steps[name],
                }
        return entries

    @torch.no_grad()
    def load_state_dict(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from `state_dict()`, of a model sharded as this one is; the working weights follow.

        Raises:
            ValueError: the parameters are not the ones that learn here.
        """
        names = {name for group in self.groups for name in group}
        if names != entries.keys():
            raise ValueError(
                f"optimizer state: found parameters {sorted(entries.keys() - names)} that do not learn here, and "
                f"missed {sorted(names - entries.keys())}; use the model and lora settings of the saved run."
            )
        for group, home in zip(self.groups, self.homes, strict=True):
            state = home.load()
            for name, parameter in group.items():
                _weight(parameter, name, state=state).copy_(local(entries[name]["weight"]))
                state.exp_avg[name].copy_(local(entries[name]["exp_avg"]))
                state.exp_avg_sq[name].copy_(local(entries[name]["exp_avg_sq"]))
                state.steps[name].copy_(entries[name]["step"])
            _publish(group, state)
            home.store(state)


class _Rows:
    """Lists for the fused kernel, without the parameters of which this rank holds no row."""

    def __init__(
        self, group: ParameterGroup, state: AdamState, gradients: Mapping[str, Tensor], names: list[str]
    ) -> None:
        names = [name for name in names if gradients[name].numel()]
        self.weights = [_weight(group[name], name, state=state) for name in names]
        self.gradients = [gradients[name] for name in names]
        self.exp_avg = [state.exp_avg[name] for name in names]
        self.exp_avg_sq = [state.exp_avg_sq[name] for name in names]
        self.steps = [state.steps[name] for name in names]


def _zero_state(group: ParameterGroup, masters: Mapping[str, Tensor]) -> AdamState:
    def zeros(parameter: Tensor) -> Tensor:
        return torch.zeros_like(local(parameter), dtype=torch.float32)

    return AdamState(
        masters={name: masters[name] for name in group if masters},
        exp_avg={name: zeros(parameter) for name, parameter in group.items()},
        exp_avg_sq={name: zeros(parameter) for name, parameter in group.items()},
        steps={name: torch.zeros((), device=parameter.device) for name, parameter in group.items()},
    )


def _weight(parameter: Tensor, name: str, *, state: AdamState) -> Tensor:
    """The fp32 rows that learn: the master's, or the parameter's own."""
    return state.masters[name] if state.masters else local(parameter)


def _publish(group: ParameterGroup, state: AdamState) -> None:
    """Round the masters into the working weights, where there are masters."""
    if state.masters:
        torch._foreach_copy_([local(group[name]) for name in group], [state.masters[name] for name in group])
