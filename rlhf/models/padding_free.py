"""Forwards without padding: the real tokens of a micro-batch go through a decoder as one row.

Hooks around the decoder do it, so nobody else sees it: in front of it `[B, T]` ids become `[1, N]`, N real tokens, with
the position that each has in its own sequence; behind it hidden states `[1, N, D]` become `[B, T, D]` again, 0 at
padding. Everything in between works on single tokens, except attention, which is called once for each sequence (SDPA)
or told where sequences begin (flash). So no sequence sees another, and nothing is computed for padding.

What attention needs to know travels as the decoder's mask, an argument of each block: a block that is computed again in
backward gets the same one. Results equal padded ones up to rounding, with dropout in distribution.
Left out: generation, whose forwards use a cache; a micro-batch that has no padding, which is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def compute_without_padding(decoder: nn.Module) -> None:
    """From now on; `decoder` makes masks, runs the blocks and returns hidden states."""
    decoder.register_forward_pre_hook(_join, with_kwargs=True)
    decoder.register_forward_hook(_part, always_call=True)


@dataclass(frozen=True)
class _RealTokens:
    """The real tokens of a micro-batch as one row."""

    places: tuple[Tensor, Tensor]  # N row numbers, N columns
    lengths: list[int]  # of the sequences, sum N
    shape: torch.Size  # [B, T]

    def of(self, values: Tensor) -> Tensor:
        """`[B, T]` -> `[1, N]`."""
        return values[self.places].unsqueeze(0)

    def padded(self, hidden: Tensor) -> Tensor:
        """`[1, N, D]` -> `[B, T, D]`."""
        whole = hidden.new_zeros(*self.shape, hidden.shape[-1])
        whole[self.places] = hidden.squeeze(0)
        return whole


_ROW: ContextVar[_RealTokens | None] = ContextVar("row", default=None)
"""What the decoder that runs now computes; read where masks are made, which no backward does again."""


def has_padding(attention_mask: Tensor) -> bool:
    """Whether a forward of a micro-batch with this mask, `[B, T]`, is one of `[1, N]`; waits for the device."""
    return not bool(attention_mask.all())


def _join(decoder: nn.Module, *hooked: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the decoder, called with its inputs: `[B, T]` -> `[1, N]`."""
    args, kwargs = hooked
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if kwargs.get("use_cache") is not False or mask is None or positions is None or not has_padding(mask):
        return args, kwargs
    mask = mask.bool()
    row = _RealTokens(mask.nonzero(as_tuple=True), [count for count in mask.sum(-1).tolist() if count], mask.shape)
    ids = row.of(args[0] if args else kwargs["input_ids"])
    kwargs = kwargs | {"attention_mask": torch.ones_like(ids, dtype=torch.bool), "position_ids": row.of(positions)}
    if "flash" in decoder.config._attn_implementation:  # type: ignore[union-attr, operator]
        kwargs |= _for_flash(row.lengths, device=ids.device)
    _ROW.set(row)
    return ((ids, *args[1:]), kwargs) if args else (args, kwargs | {"input_ids": ids})


def _part(*hooked: Any) -> None:
    """After the decoder, called with its output, None after an error: `[1, N, D]` -> `[B, T, D]`."""
    output = hooked[-1]
    row = _ROW.get()
    _ROW.set(None)
    if row is not None and output is not None:
        output.last_hidden_state = row.padded(output.last_hidden_state)


def _for_flash(lengths: list[int], *, device: torch.device) -> dict[str, Any]:
    """What flash attention of transformers understands, which looks for no sequences in a row then."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)  # [B + 1]
    kwargs: dict[str, Any] = {f"cu_seq_lens_{side}": ends for side in ("q", "k")}
    return kwargs | {f"max_length_{side}": max(lengths) for side in ("q", "k")} | {"attention_mask": None}


@dataclass(frozen=True)
class SequenceMasks:
    """In place of the mask of a row: one for each sequence in it. FSDP2 and recomputation pass it on untouched."""

    lengths: list[int]
    by_length: dict[int, Tensor | None]
    """`[1, 1, n, n]`, True where a token sees another; None for plain causal attention."""

    def attend(self, attention: Callable[..., Any], known: dict[str, Any]) -> tuple[Tensor, None]:
        """Attention from queries `[1, H, N, width]`, keys and values to `[1, N, H, width]`, a sequence at a time."""
        parts = [known[name].split(self.lengths, dim=2) for name in ("query", "key", "value")]
        outputs = []
        for count, query, key, value in zip(self.lengths, *parts, strict=True):
            own = {"query": query, "key": key, "value": value, "attention_mask": self.by_length[count]}
            outputs.append(attention(**known | own)[0])
        return torch.cat(outputs, dim=1), None


def sequence_masks(make: Callable[..., Tensor | None], arguments: dict[str, Any]) -> SequenceMasks | None:
    """The masks of the row that the decoder computes; None where it computes a padded micro-batch.

    Args:
        make: Makes a mask of transformers, which knows windows.
        arguments: What it was called with for the whole row.
    """
    row = _ROW.get()
    if row is None:
        return None
    arguments = arguments | {"attention_mask": None}
    masks = {count: make(**arguments | {"q_length": count, "kv_length": count}) for count in set(row.lengths)}
    return SequenceMasks(row.lengths, masks)


def expects_sequence_masks() -> bool:
    """Whether a row is computed whose attention must come with `SequenceMasks`: without, sequences would mix."""
    return _ROW.get() is not None
