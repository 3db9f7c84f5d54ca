"""Fills a model that is on meta with weights, each rank reading the rows it keeps and no others.

The model is sharded first and filled after, so no rank ever holds more than its share and one parameter's rows on top.
Left out: where the rows come from (`Blueprint.weights`).
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.engine.sharding import like, local

if TYPE_CHECKING:
    from rlhf.dist import World
    from rlhf.models.blueprint import Blueprint


def materialize(blueprint: Blueprint, *, dtype: torch.dtype, world: World) -> dict[str, Tensor]:
    """Give every parameter memory on `world.device` in `dtype`, and its weights; buffers keep their type.

    Returns:
        This rank's rows of the fp32 master weights of the parameters that learn, as precise as the checkpoint is;
        empty when `dtype` is fp32, where the weights are their own masters.
    """
    _move_buffers(blueprint.module, world.device)
    owners = _owners(blueprint.module)
    masters = {}
    for name, empty in list(blueprint.module.named_parameters()):
        rows = blueprint.weights.read(name, _rows(empty, world))
        assert rows.shape == local(empty).shape, f"{name}: read {tuple(rows.shape)} for {tuple(local(empty).shape)}"
        filled = nn.Parameter(like(empty, _copy(rows, dtype, device=world.device)), requires_grad=empty.requires_grad)
        if empty.requires_grad and dtype != torch.float32:
            masters[name] = _copy(rows, torch.float32, device=world.device)
        for module, key in owners[id(empty)]:
            module.register_parameter(key, filled)
    return masters


def _rows(parameter: Tensor, world: World) -> slice:
    """The rows that this rank keeps: `ceil(rows / ranks)` each, the last ranks fewer or none."""
    total = parameter.shape[0] if parameter.ndim else 1
    if not isinstance(parameter, DTensor):
        return slice(0, total)
    share = -(-total // world.size)
    return slice(min(world.rank * share, total), min((world.rank + 1) * share, total))


def _copy(rows: Tensor, dtype: torch.dtype, *, device: torch.device) -> Tensor:
    """A copy of its own: what was read may be a view of a file."""
    return torch.empty(rows.shape, dtype=dtype, device=device).copy_(rows)


def _owners(root: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each parameter hangs, by `id`; a tied one hangs in several places."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in root.modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(parameter)].append((module, key))
    return owners


def _move_buffers(root: nn.Module, device: torch.device) -> None:
    for module in root.modules():
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            setattr(module, key, buffer.to(device))
