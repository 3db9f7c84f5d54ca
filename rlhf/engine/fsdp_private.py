"""What we need of FSDP2 that it offers no public name for: all of its private attributes that we touch are here."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState


def hook_keys(module: nn.Module) -> set[int]:
    """The keys of a module's forward hooks."""
    return {*module._forward_pre_hooks, *module._forward_hooks}


def end_forwards(modules: list[FSDPModule]) -> None:
    """Bring FSDP2 to where it is between steps, with everything freed, whatever was cut short.

    A gather that was started ahead of use would otherwise be used by a later forward, with outdated weights; a forward
    that raised would be taken to go on; and forwards without a backward leave a few references each behind.

    Args:
        modules: one of each unit, the root first.
    """
    for module in modules:
        state = module._get_fsdp_state()
        state._training_state = TrainingState.IDLE
        state._modules_to_run_forward.clear()
        group = state._fsdp_param_group
        if group is not None:
            group.wait_for_unshard()
            group._training_state = TrainingState.IDLE
            group._post_forward_indices.clear()
        module.reshard()
    root = modules[0]._get_fsdp_state()
    if root._is_root:  # set by the first forward
        root._state_ctx.iter_forward_root = None
        root._comm_ctx.post_forward_order.clear()


def gather_when_used(module: FSDPModule) -> None:
    """Queue a module's gathers behind what computes, not beside it."""
    state = module._get_fsdp_state()
    if state._fsdp_param_group is not None:
        state._fsdp_param_group.unshard_async_op = True
