"""A tensor that stands for weights which are elsewhere: shape, type and device, and no memory.

FSDP2 asks a sharded parameter's local tensor for what it contributes to a gather, if the tensor has the two methods
below (PyTorch's protocol for tensors that are not gathered as they are). Here the answer comes from where the weights
rest, is used for the copy into the gather and is forgotten. Left out: where that is (`weights.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_SHAPES_ONLY = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.view.default,
    _aten.slice.Tensor,
    _aten.new_zeros.default,
}


class OffloadedShard(Tensor):
    """This rank's rows of a parameter while they rest elsewhere."""

    source: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls: type[OffloadedShard],
        shape: torch.Size,
        *,
        dtype: torch.dtype,
        device: torch.device,
        source: Callable[[], Tensor],
    ) -> Any:
        """Stand for rows of `shape`; `source` brings them, padded to the first rank's, as FSDP2 wants them."""
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.source = source
        return made

    def fsdp_pre_all_gather(self, mesh: Any) -> Any:
        """What this rank contributes to a gather."""
        return (self.source(),), None

    def fsdp_post_all_gather(self, outputs: Any, *_: Any, out: Tensor | None = None) -> Any:
        """What was gathered is the parameter itself; the second time it is already in its place."""
        return None if out is not None else (outputs[0], ())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Operations that only concern shapes; whoever wants values is told where they are."""
        this = args[0]
        if func is _aten.copy_.default:  # FSDP2 pads the rows of the last ranks: `source` has done it
            return this
        if func is _aten.zeros_like.default:
            return torch.zeros(this.shape, **{"dtype": this.dtype, "device": this.device, **_options(kwargs)})
        if func not in _SHAPES_ONLY:
            raise RuntimeError(f"{func}: these weights rest off the device; read them through `Sharding.rows`.")
        outline = func(torch.empty(this.shape, dtype=this.dtype, device="meta"), *args[1:])
        return cls(outline.shape, dtype=this.dtype, device=this.device, source=this.source)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Without values."""
        return f"OffloadedShard({tuple(self.shape)}, {self.dtype}, {self.device})"


def _options(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Type and device that a caller asked for."""
    return {key: value for key, value in (kwargs or {}).items() if key in ("dtype", "device") and value is not None}
