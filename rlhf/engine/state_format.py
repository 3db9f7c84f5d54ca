"""How optimizer state is stored: fp32, or in fewer bytes, from which AdamW's fp32 values are made and stored again.

| what | stored as | bytes an element | error |
|---|---|---|---|
| masters | fp32 | 4 | none |
| | the 16 bits that bf16 working weights lack | 2 | none |
| moments | fp32 | 4 each | none |
| | bf16 | 2 each | at most 2^-8 of the value |
| | 8 bits and a scale for every 256 elements | 1 1/64 each | see [Note: 8 bits] |

[Note: split masters] bf16 is the upper half of fp32. A master's lower half `low`, read as a signed number, is the way
back from the nearest multiple of 2^16 to the master, and that multiple is the bf16 number nearest to the master. So
`master = working + low`, added as integers, for every pattern of bits. A master in the middle of two bf16 numbers goes
to the one further from zero, where a cast to bf16 takes the even one: with 16 bits both cannot be told apart. That is
the only difference that splitting makes, in one of 131072 roundings.

[Note: 8 bits] Blocks of 256 elements are divided by the largest of them, as by Dettmers et al. 2022 (arXiv:2110.02861),
section 2.1. What lies between is spaced by a root, not by their table: arithmetic is many times faster on a CPU than a
search. First moments are stored as the signed square root in 127 steps, second ones, of which AdamW takes the root, as
the fourth root in 255: a root is within a step of 1/127 in the one and 1/255 in the other. No second moment that is not
zero becomes zero, or its parameter would jump.
A decay of 0.999 changes a second moment by less than a step of it, and rounding to the nearest would always undo that.
So second moments are rounded up or down by chance, and are right on average. The chance is a table, by block and step,
so that every store and every run has the same bits. What was stored and is stored again without a change stays as it
is: a checkpoint, which is in fp32, resumes bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from rlhf.config.engine_config import EngineConfig, GradDtype, MasterWeights, MomentDtype, OffloadDevice

BLOCK = 256
"""Elements that share a scale in 8 bits; cuts are made between blocks."""
SCALE_BYTES = 4
STATE_KEYS = ("weight", "exp_avg", "exp_avg_sq")
"""What is kept of each parameter: the fp32 master weight and the two moments."""
_LEAST_SCALE = 2.0**-90  # so that a code's value is not subnormal, and a block of zeros divides by something
_ROWS = 127  # of the table of chances; prime, so that steps and blocks run through all of it
_STEP = 31  # rows from one optimizer step to the next


@dataclass(frozen=True)
class StateFormat:
    """Types of the optimizer state and of gradient sums."""

    sums: torch.dtype = torch.float32
    """Of gradients that were added up, over micro-batches or ranks: fp32 or bf16."""
    is_split: bool = False
    """Whether masters are the bits that bf16 working weights lack."""
    moments: MomentDtype = MomentDtype.fp32

    @classmethod
    def of(cls, engine: EngineConfig, dtype: torch.dtype) -> StateFormat:
        """Of a model with working weights of `dtype`."""
        is_narrow = dtype is torch.bfloat16
        sums = torch.bfloat16 if is_narrow and engine.grad_accum_dtype == GradDtype.bf16 else torch.float32
        # Working weights on a disk are written as they follow each other; a step that reads them, too, would wait.
        in_memory = engine.offload_param != OffloadDevice.nvme
        return cls(sums, is_narrow and in_memory and engine.master_weights == MasterWeights.split, engine.moments)

    @property
    def is_quantised(self) -> bool:
        """Whether moments have 8 bits and a scale for each block."""
        return self.moments == MomentDtype.int8

    def width(self, key: str) -> int:
        """Bytes of an element of one of `STATE_KEYS`, without scales."""
        if key == "weight":
            return 2 if self.is_split else 4
        return {MomentDtype.fp32: 4, MomentDtype.bf16: 2, MomentDtype.int8: 1}[self.moments]

    def nbytes(self, key: str, numel: int) -> int:
        """Bytes of `numel` elements in memory."""
        if key == "weight" or not self.is_quantised:
            return self.width(key) * numel
        return num_blocks(numel) * (BLOCK + SCALE_BYTES)

    def dtype(self, key: str) -> torch.dtype:
        """Of the elements that are stored, or of their codes."""
        if key == "weight":
            return torch.int16 if self.is_split else torch.float32
        codes = torch.uint8 if key == "exp_avg_sq" else torch.int8
        return {MomentDtype.fp32: torch.float32, MomentDtype.bf16: torch.bfloat16, MomentDtype.int8: codes}[
            self.moments
        ]


class Packed(ABC):
    """Elements of a parameter's shard in a form that needs more than a cast; flat."""

    numel: int

    @abstractmethod
    def cut(self, start: int, stop: int) -> Packed:
        """Elements [start, stop) of it; `start` is a multiple of `BLOCK`."""

    @abstractmethod
    def load(self, into: Tensor, spare: Tensor) -> None:
        """Make the fp32 values; `into` and `spare` are [whole blocks], `spare` may hold anything before and after."""

    @abstractmethod
    def save(self, values: Tensor, spare: Tensor, *, step: Tensor) -> None:
        """Store fp32 values [whole blocks], which are of no use afterwards, after update number `step`, [] fp32."""


Stored = Tensor | Packed
"""Elements of a shard: fp32 or bf16 as they are, or in another form."""


@dataclass(frozen=True)
class SplitMaster(Packed):
    """Masters by what bf16 working weights lack of them; see [Note: split masters].

    `save` leaves in its argument what the working weights must become, in fp32: storing that is the caller's.
    """

    low: Tensor
    """int16 [numel]"""
    working: Callable[[slice], Tensor]
    """Gives a part of the shard's working weights, bf16 on any device."""
    start: int = 0
    """Of the first element in the shard."""

    @property
    def numel(self) -> int:  # type: ignore[override]
        """Elements."""
        return self.low.numel()

    def cut(self, start: int, stop: int) -> SplitMaster:
        """Elements [start, stop) of it."""
        return replace(self, low=self.low[start:stop], start=self.start + start)

    def load(self, into: Tensor, spare: Tensor) -> None:
        """Add the lower halves to the working weights, as integers."""
        into, spare = into[: self.numel], spare[: self.numel]
        into.copy_(self.working(slice(self.start, self.start + self.numel)))  # bf16 -> fp32: 16 zeros follow
        into.view(torch.int32).add_(spare.view(torch.int32).copy_(self.low))

    def save(self, values: Tensor, spare: Tensor, *, step: Tensor) -> None:
        """Keep the lower halves, and leave values that bf16 holds exactly."""
        bits, spare = values[: self.numel].view(torch.int32), spare[: self.numel].view(torch.int32)
        self.low.copy_(bits)  # the cast keeps the lower 16 bits
        bits.sub_(spare.copy_(self.low))


@dataclass(frozen=True)
class Quantised(Packed):
    """Moments in 8 bits; see [Note: 8 bits]."""

    codes: Tensor
    """[whole blocks]: int8 for first moments, uint8 for second ones"""
    scales: Tensor
    """fp32 [blocks]: the largest of each block"""
    numel: int
    """Elements; what fills the last block does not count."""
    first: int = 0
    """Number of the first block in the shard."""

    def cut(self, start: int, stop: int) -> Quantised:
        """Elements [start, stop) of it."""
        blocks = slice(start // BLOCK, num_blocks(stop))
        codes = self.codes[blocks.start * BLOCK : blocks.stop * BLOCK]
        return Quantised(codes, self.scales[blocks], stop - start, self.first + blocks.start)

    def load(self, into: Tensor, spare: Tensor) -> None:
        """From codes to values."""
        codes, values, factors = self.codes.view(-1, BLOCK), into.view(-1, BLOCK), self.scales[:, None]
        values.copy_(codes)  # [blocks, 256]
        if codes.dtype == torch.int8:
            torch.abs(values.div_(127), out=(roots := spare.view(-1, BLOCK)))
            values.mul_(roots.mul_(factors))  # sign * root^2 * largest: a division, so that the largest is exact
        else:
            values.div_(255).square_().square_().mul_(factors)
        into[self.numel :].zero_()  # what fills the last block

    def save(self, values: Tensor, spare: Tensor, *, step: Tensor) -> None:
        """From values to codes."""
        blocks, roots = values.view(-1, BLOCK), spare.view(-1, BLOCK)
        signed = self.codes.dtype == torch.int8
        values[self.numel :].zero_()
        magnitudes = torch.abs(blocks, out=roots) if signed else blocks
        torch.amax(magnitudes, 1, out=self.scales)
        self.scales.clamp_(min=_LEAST_SCALE)
        torch.mul(magnitudes, ((127.0**2 if signed else 255.0**4) / self.scales)[:, None], out=roots)
        if signed:
            roots.sqrt_().round_().copysign_(blocks)
        else:
            # The kernel is done with the values: their memory holds the chances.
            rows = (torch.arange(len(blocks), device=values.device) + self.first + _STEP * step.long()) % _ROWS
            torch.index_select(_chances(values.device), 0, rows, out=blocks)
            roots.sqrt_().sqrt_().add_(blocks).clamp_(1, 255)  # the cast below rounds down
        self.codes.view(-1, BLOCK).copy_(roots)


def pack(stored: Stored, values: Tensor, *, step: Tensor) -> Tensor:
    """Store fp32 values [numel]; returns what the working weights of masters become, in fp32."""
    if isinstance(stored, Tensor):
        stored.copy_(values)
        return values
    padded = torch.zeros(num_blocks(stored.numel) * BLOCK, device=values.device)
    padded[: stored.numel] = values
    stored.save(padded, torch.empty_like(padded), step=step)
    return padded[: stored.numel]


def unpack(stored: Stored, device: torch.device) -> Tensor:
    """fp32 values [numel] on the device of what is stored: the memory itself where it is fp32, else a copy."""
    if isinstance(stored, Tensor):
        return stored.float()
    values = torch.empty(num_blocks(stored.numel) * BLOCK, device=device)
    stored.load(values, torch.empty_like(values))
    return values[: stored.numel]


def num_blocks(numel: int) -> int:
    """Blocks that hold so many elements."""
    return -(-numel // BLOCK)


@cache
def _chances(device: torch.device) -> Tensor:
    """[127, 256] fp32 in (0, 1): down a column, every 127th occurs once."""
    random = torch.rand(_ROWS, BLOCK, generator=torch.Generator().manual_seed(0))
    return ((random.argsort(0) + 0.5) / _ROWS).to(device)
