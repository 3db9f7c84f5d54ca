"""The optimizer and the schedule that the Trainer sees, in front of the engine's AdamW.

The optimizer shares its groups with the one that the Trainer or the user has made, whose parameters it takes over: a
scheduler of either sets the learning rates that the engine uses in the next step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from rlhf.deepspeed.arithmetic import DeepSpeedSchedule, deepspeed_schedule
from rlhf.engine.adam_kernel import AdamGroup
from rlhf.engine.engine import Engine
from rlhf.engine.gradients import GradientNorm


class ZeroOptimizer(torch.optim.Optimizer):
    """AdamW by groups; gradients, masters and moments are the engine's, wherever they are kept."""

    step_was_skipped = False
    """Whether the last step was left out because a gradient was not finite; Accelerate asks for it."""

    def __init__(self, engine: Engine, groups: list[NamedGroup]) -> None:
        """Take over `groups`, whose parameters are now those of the engine."""
        self.engine = engine
        self._names: list[list[str]] = []
        self._found: GradientNorm | None = None
        self._limit = 0.0  # of the norm, for the step that follows; 0 is none
        self._has_backward = False
        self._is_accelerate_prepared = True  # Accelerate would move the state to the device
        trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
        for group in groups:
            names = [name for name in group.names if name in trained]
            group.options["params"] = [engine.module.get_parameter(name) for name in names]
            self._names.append(names)
            trained -= {*names}
        # Parameters that learn but are in no group have gradients, which count in the norm, and never change.
        self._left_out = dict.fromkeys(trained, AdamGroup(0.0, (0.9, 0.999), 1e-8, 0.0))
        super().__init__([group.options for group in groups], {})

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients, averaged over ranks; `last` is the step's last micro-batch."""
        self._has_backward = True
        # In fp32: a model's loss may be fp16, where the loss scale would overflow.
        self.engine.backward(loss.float() / self.engine.world.size, last=last)

    def clip(self, limit: float) -> Tensor:
        """The norm of the step's gradients, all ranks together; the step will bring them down to `limit`."""
        if not self._has_backward:
            raise RuntimeError(
                "there are no gradients for this step; expected a backward through `trainer.accelerator.backward(loss)`"
                ", not `loss.backward()`."
            )
        self._found = self._found or self.engine.reduce_norm()  # a collective
        self._limit = limit if math.isfinite(limit) else self._limit
        return torch.tensor(self._found.norm)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters, or skip the step on all ranks where a gradient is not finite."""
        if closure is not None:
            raise ValueError("a closure computes gradients again; expected none, for gradients are reduced already.")
        self.clip(math.inf)
        assert self._found is not None, "clip has found it"
        clip = 1.0
        if self._limit:  # in fp32, as `clip_grad_norm_` computes it, to the bit
            clip = torch.clamp(self._limit / (torch.tensor(self._found.norm) + 1e-6), max=1.0).item()
        result = self.engine.update(self._found, groups=self._settings(), clip=clip)
        self.step_was_skipped = result.skipped
        self._end()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients since the last step."""
        if self._has_backward:
            self.engine.drop_gradients()
        self._end()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the groups' options in place, for schedulers hold them; the engine's checkpoint has the rest."""
        saved = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in saved] != sizes:
            raise ValueError(
                f"the checkpoint's optimizer has groups of {[len(group['params']) for group in saved]} parameters; "
                f"expected {sizes}, as this run has. Make the groups as the saved run did."
            )
        for group, options in zip(self.param_groups, saved, strict=True):
            group.update({key: value for key, value in options.items() if key != "params"})

    def _end(self) -> None:
        self._found, self._limit, self._has_backward = None, 0.0, False

    def _settings(self) -> Mapping[str, AdamGroup]:
        settings = dict(self._left_out)
        for names, group in zip(self._names, self.param_groups, strict=True):
            beta1, beta2 = group["betas"]
            made = AdamGroup(float(group["lr"]), (float(beta1), float(beta2)), group["eps"], group["weight_decay"])
            settings.update(dict.fromkeys(names, made))
        return settings


class NamedGroup:
    """A group of parameters whose parameters are known by name: sharding replaces the parameters themselves."""

    def __init__(self, options: dict[str, Any], names: list[str]) -> None:
        self.options, self.names = options, names


def named_groups(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[NamedGroup]:
    """The groups of an optimizer over a module's parameters, which it gives up.

    Raises:
        ValueError: it is not AdamW, or has parameters of something else.
    """
    _require_adamw(optimizer)
    names = {id(p): name for name, p in module.named_parameters()}
    found = []
    for options in optimizer.param_groups:
        unknown = sum(id(p) not in names for p in options["params"])
        if unknown:
            raise ValueError(f"the optimizer has {unknown} parameters that are not the model's; expected none.")
        found.append(NamedGroup(options, [names[id(p)] for p in options["params"]]))
        options["params"] = []  # Lifetime: they hold the weights, which are about to be sharded
    optimizer._opt_called = True  # type: ignore[attr-defined]  # a scheduler of it would warn
    return found


def _require_adamw(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless the engine's AdamW does what the optimizer would."""
    kind, groups = type(optimizer), optimizer.param_groups
    is_adam = issubclass(kind, torch.optim.Adam | torch.optim.AdamW)
    is_plain = is_adam and not any(group.get("amsgrad") or group.get("maximize") for group in groups)
    decoupled = issubclass(kind, torch.optim.AdamW)
    if not is_plain or not all(
        decoupled or group.get("decoupled_weight_decay") or not group["weight_decay"] for group in groups
    ):
        raise ValueError(
            f"the optimizer is {kind.__module__}.{kind.__name__}; the engine shards and offloads AdamW. Expected "
            f"optim='adamw_torch_fused' or 'adamw_torch' (the default), or a torch.optim.AdamW without amsgrad and "
            f"maximize. For 8-bit or bf16 states set them in the DeepSpeed configuration (bf16.bf16_optimizer_states)."
        )


class DeepSpeedScheduler(LRScheduler):
    """One of DeepSpeed's schedules, value for value, for any number of groups."""

    def __init__(self, optimizer: torch.optim.Optimizer, kind: str, *, options: Mapping[str, Any], total: int) -> None:
        """Schedule `total` optimizer steps; `kind` and `options` are those of `deepspeed_schedule`."""
        self._schedules: list[DeepSpeedSchedule] = [
            deepspeed_schedule(kind, lr=group["lr"], warmup_steps=0, total_steps=total, options=options)
            for group in optimizer.param_groups
        ]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group in the next step; sets the betas too where the schedule moves them."""
        for group, schedule in zip(self.optimizer.param_groups, self._schedules, strict=True):
            group["betas"] = schedule.betas_at(self.last_epoch) or group["betas"]
        return [schedule.lr_at(self.last_epoch) for schedule in self._schedules]

    def state_dict(self) -> dict[str, Any]:
        """The position alone: everything else follows from the configuration."""
        return {name: getattr(self, name) for name in ("last_epoch", "_step_count", "_last_lr")}
