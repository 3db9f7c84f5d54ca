"""All private attributes of FSDP2 that this project touches, because there is no public name for what they do."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

_FSDP = "torch.distributed.fsdp"


def hook_keys(module: nn.Module) -> set[int]:
    """The keys of a module's forward hooks."""
    return {*module._forward_pre_hooks, *module._forward_hooks}


def end_forwards(modules: list[FSDPModule]) -> None:
    """Return FSDP2 to its state between steps, with everything freed, whatever was cut short.

    Otherwise a later forward would use a gather that was prefetched before the weights changed; a forward that raised
    would count as still running; and forwards without a backward would each leave a few references behind.

    Args:
        modules: one of each unit, the root first.
    """
    for module in modules:
        state = module._get_fsdp_state()
        state._training_state = TrainingState.IDLE
        state._modules_to_run_forward.clear()
        group = state._fsdp_param_group
        if group is not None:
            # Consume a prefetched all-gather first: resharding alone would leave its result for the next forward.
            group.wait_for_unshard()
            group._training_state = TrainingState.IDLE
            group._post_forward_indices.clear()
        module.reshard()  # local: frees the gathered memory, talks to no other rank
    root = modules[0]._get_fsdp_state()
    if root._is_root:  # set by the first forward; before it there is nothing to end
        root._state_ctx.iter_forward_root = None
        root._comm_ctx.post_forward_order.clear()


def gather_root(root: FSDPModule) -> None:
    """Gather the first unit, which its modules read, before any forward of the root: parts may be called first."""
    root._get_fsdp_state()._lazy_init()  # in the first forward otherwise, and a part would take itself for the root
    root.unshard()  # all-gather: all ranks must come here


def gather_on_compute_stream(module: FSDPModule) -> None:
    """Queue a module's all-gathers on the stream that computes, so that the two never overlap."""
    state = module._get_fsdp_state()
    if state._fsdp_param_group is not None:
        state._fsdp_param_group.unshard_async_op = True  # FSDP2 then copies in and out on the current stream


@contextmanager
def without_load_hooks(root: nn.Module) -> Iterator[None]:
    """Inside, loading a state dict does not make FSDP2 look for its own parameters, which are not there."""
    saved = [(part, part._load_state_dict_post_hooks) for part in root.modules()]
    for part, hooks in saved:
        foreign = ((key, hook) for key, hook in hooks.items() if not str(hook.__module__).startswith(_FSDP))
        part._load_state_dict_post_hooks = OrderedDict(foreign)
    try:
        yield
    finally:
        for part, hooks in saved:
            part._load_state_dict_post_hooks = hooks


def unwrap(module: FSDPModule) -> None:
    """Make a module what it was before `fully_shard`, but for its parameters, which the caller has replaced."""
    state = module._get_fsdp_state()
    group = state._fsdp_param_group
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    if group is not None:
        handles += [*group._module_to_pre_save_state_dict_hook_handle.values()]
        handles += [*group._module_to_pre_load_state_dict_hook_handle.values()]
        handles += [parameter._post_load_hook_handle for parameter in group.fsdp_params]
    for handle in handles:
        handle.remove()
    for part in state._modules:  # those of a group share a state
        part.__class__ = type(part).__mro__[2]  # FSDP2 derives a class from `FSDPModule` and the module's own
        del part.__dict__[REGISTRY_KEY], part.__dict__[STATE_KEY]
        del _module_state_mapping[part]
