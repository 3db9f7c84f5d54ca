"""Forwards without padding: the real tokens of a micro-batch go through a decoder as one row.

Hooks around the decoder do it, so nobody else sees it: in front of it `[B, T]` ids become `[1, N]`, N real tokens, with
the position that each has in its own sequence; behind it hidden states `[1, N, D]` become `[B, T, D]` again, 0 at
padding. Everything in between works on single tokens, except attention, which is called once for each sequence (SDPA)
or told where sequences begin (flash). So no sequence sees another, and nothing is computed for padding.

What attention needs to know travels as the decoder's mask, an argument of each block: a block that is computed again in
backward gets the same one. Results equal padded ones up to rounding, with dropout in distribution.
Left out: generation, whose forwards use a cache; micro-batches with too little padding to gain anything.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.types import WIDTHS

_LARGEST_STEP = 64
"""What the length of a row is rounded up to at most."""


def compute_without_padding(decoder: nn.Module) -> None:
    """From now on; `decoder` makes masks, runs the blocks and returns hidden states."""
    decoder.register_forward_pre_hook(_join, with_kwargs=True)
    decoder.register_forward_hook(_part, always_call=True)


def row_length(num_tokens: int, padded: int) -> int:
    """Tokens of the row as which a micro-batch is computed; 0 where that is no shorter, and so the padding stays.

    A row is rounded up, by an eighth at most: oneDNN compiles kernels for each length, and tensors of ever new sizes
    leave holes in the heap (0.15 GB in the default run).

    Args:
        num_tokens: Real ones.
        padded: All of `[B, T]`.
    """
    step = max(WIDTHS, min(1 << (num_tokens // 16).bit_length(), _LARGEST_STEP))
    length = -(-num_tokens // step) * step
    return length if length < padded else 0


@dataclass(frozen=True)
class _TokenRow:
    """The real tokens of a micro-batch `[B, T]` as a row of N, filled up at the end by a sequence of its own."""

    places: tuple[Tensor, ...]  # row numbers and columns of the real tokens
    lengths: list[int]  # of the sequences, the one that fills up included, sum N
    shape: torch.Size

    @classmethod
    def of(cls, mask: Tensor) -> _TokenRow | None:
        """The row of a micro-batch with this mask, True for real tokens; None where its padding stays."""
        lengths = mask.sum(-1).tolist()  # waits for the device
        length = row_length(sum(lengths), mask.numel())
        if not length:
            return None
        lengths.append(length - sum(lengths))
        return cls(mask.nonzero(as_tuple=True), [count for count in lengths if count], mask.shape)

    def joined(self, values: Tensor) -> Tensor:
        """`[B, T]` -> `[1, N]`."""
        real = values[self.places]
        return F.pad(real, (0, sum(self.lengths) - len(real))).unsqueeze(0)

    def parted(self, hidden: Tensor) -> Tensor:
        """`[1, N, D]` -> `[B, T, D]`, 0 at padding."""
        whole = hidden.new_zeros(*self.shape, hidden.shape[-1])
        whole[self.places] = hidden[0, : len(self.places[0])]
        return whole


_ROW: ContextVar[_TokenRow | None] = ContextVar("row", default=None)
"""What the decoder that runs now computes; read where masks are made, which no backward does again."""


def _join(decoder: nn.Module, *hooked: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the decoder, called with its inputs: `[B, T]` -> `[1, N]`."""
    args, kwargs = hooked
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    fits = kwargs.get("use_cache") is False and mask is not None and positions is not None
    row = _TokenRow.of(mask.bool()) if fits else None
    _ROW.set(row)
    if row is None:
        return args, kwargs
    ids = row.joined(args[0] if args else kwargs["input_ids"])
    kwargs = kwargs | {"attention_mask": torch.ones_like(ids), "position_ids": row.joined(positions)}
    if "flash" in decoder.config._attn_implementation:  # type: ignore[union-attr, operator]
        kwargs |= _for_flash(row.lengths, device=ids.device)
    return ((ids, *args[1:]), kwargs) if args else (args, kwargs | {"input_ids": ids})


def _part(*hooked: Any) -> None:
    """After the decoder, called with its output, None after an error: `[1, N, D]` -> `[B, T, D]`."""
    output = hooked[-1]
    row = _ROW.get()
    _ROW.set(None)
    if row is not None and output is not None:
        output.last_hidden_state = row.parted(output.last_hidden_state)


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


def expect_no_row(module: nn.Module) -> None:
    """Raise ValueError if a row is computed: its attention, in `module`, must come with `SequenceMasks`."""
    if _ROW.get() is not None:
        raise ValueError(
            f"{type(module).__name__} makes a mask of its own, with which the sequences of a row would see each other; "
            "set engine.padding_free=false."
        )
