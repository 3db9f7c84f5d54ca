"""The squared 2-norm of a flat shard that may come in parts.

It is summed in fp32 over blocks of 2048 elements and in fp64 over blocks, so that it does not depend on where the shard
was cut (at multiples of a block) or kept, but for the last bits of the fp64 sum. Rounded to fp32 it is the same number,
and clipping by it gives the same weights with every state store of a CPU machine. (CUDA sums the norms of gradients
that stay there in fp32.)
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

BLOCK = 2048  # elements
_TILE = 1 << 18  # elements that are cast at once on the CPU: they stay in cache


def squared_norm(shard: Tensor) -> Tensor:
    """Sum of squares of a flat tensor of any floating type: [] fp64 on its device."""
    total = torch.zeros((), dtype=torch.float64, device=shard.device)
    step = _TILE if shard.device.type == "cpu" else max(shard.numel(), 1)
    for tile in torch.split(shard, step):
        whole = tile.numel() // BLOCK * BLOCK
        if shard.device.type == "cpu" and shard.dtype != torch.float32:
            # A norm that casts as it goes is many times slower than a cast in cache and a norm.
            tile = _scratch(tile.numel()).copy_(tile)
        for blocks in (tile[:whole].view(-1, BLOCK), tile[whole:].view(1, -1)):
            if blocks.numel():
                norms = torch.linalg.vector_norm(blocks, dim=1, dtype=torch.float32)
                total += norms.double().square_().sum()
    return total


def _scratch(count: int) -> Tensor:
    """This thread's memory for a tile, [count] fp32: pages of a fresh one would cost more than the norm."""
    if not hasattr(_OWN, "tile"):
        _OWN.tile = torch.empty(_TILE)
    tile: Tensor = _OWN.tile
    return tile[:count]


_OWN = threading.local()
