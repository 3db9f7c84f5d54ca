"""One rank's shard of a tensor, and the way from the shard to the whole tensor and back.

FSDP2 shards dimension 0 evenly: every rank holds `ceil(size / ranks)` rows, the last ranks fewer or none. A tensor that
is not a DTensor is held whole by every rank, and all functions here treat it as its own shard.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory with `tensor`; the tensor itself when it is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(parameter: Tensor) -> slice:
    """The rows of the whole parameter that this rank holds."""
    total = parameter.shape[0] if parameter.ndim else 1
    if not isinstance(parameter, DTensor):
        return slice(0, total)
    ranks, rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()
    share = -(-total // ranks)
    return slice(min(rank * share, total), min((rank + 1) * share, total))


def sharded_like(parameter: Tensor, shard: Tensor) -> Tensor:
    """A tensor sharded as `parameter` is, whose local shard is `shard` and shares its memory."""
    if not isinstance(parameter, DTensor):
        return shard
    # Shape and stride are given because ranks may hold unequal shards, or none: they cannot be inferred from one.
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,  # a check would be a collective for each parameter
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank; a collective, so all ranks must call it in the same order."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.full_tensor()  # all-gather
    return whole
