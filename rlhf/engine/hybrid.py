"""The hybrid engine: one set of weights, sharded for training and whole for generation.

See also: the decoding itself (`rlhf/generation/`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rlhf.engine.fsdp_private import gather_root
from rlhf.engine.sharding import Sharding


@contextmanager
def generating(module: nn.Module, sharding: Sharding, *, streamed: bool = False) -> Iterator[nn.Module]:
    """The model gathered once, in eval mode and without gradients; adapters are not merged where they are trained.

    No forward inside needs another rank, so ranks may decode different numbers of tokens. On the way out, whatever
    happened inside, the gathered weights are dropped; the shards that training continues with were never touched.

    With `streamed` each unit is gathered only when it is used, for a model that does not fit into the device. Then all
    ranks must make the same number of forwards.
    """
    with evaluating(module, sharding):
        if streamed and sharding.modules:
            gather_root(sharding.modules[0])  # decoding calls an encoder by itself
            yield module
            return
        sharding.gather()  # the only collective; those in FSDP2's hooks are off below
        with sharding.without_hooks():
            yield module


@contextmanager
def evaluating(module: nn.Module, sharding: Sharding) -> Iterator[nn.Module]:
    """The model in eval mode and without gradients; nothing stays gathered afterwards.

    Forwards inside gather as the stage says: every rank must make the same number of them.
    """
    # Per module, because a part may be in eval mode while the rest trains.
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield module
    finally:
        sharding.release()  # gathered weights would be out of date after the next step
        for part, training in modes:
            part.training = training
