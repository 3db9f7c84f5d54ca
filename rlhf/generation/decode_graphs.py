"""Decode steps captured as CUDA graphs, which launch all kernels of a step at once.

A step of fixed shapes reads and writes memory of fixed addresses: tokens, lengths, keys and values, and what is drawn.
It is captured once for each number of rows (N, halved as rows end) and of columns (doubled as they are needed); between
two replays, the host only copies data into that memory. The host learns of rows that ended from a copy into page-locked
memory, a few steps later, and so never waits for the device while that has nothing to do.
Without CUDA the same step runs eagerly, for tests and the memory plan. Left out: a compiler.
"""

from __future__ import annotations

import logging
import warnings
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.generation.fixed_cache import FixedCache
from rlhf.generation.kv_cache import serves
from rlhf.generation.outputs import Outputs
from rlhf.generation.slots import Slots, Step
from rlhf.generation.waiting import Prefilled, WaitingPrompts

log = logging.getLogger(__name__)

_STEPS = 4  # between two looks at who has ended: a row that has is noticed 4 to 7 steps later
_COLUMNS = 256  # of the smallest graph; a step reads all columns, so there is a graph for each power of two
_ROWS = 16  # fewer are not halved: a step would take hardly less time, and a capture takes that of several
_ROUND = 64  # the capacity is a multiple, so that the next batch, a little longer, finds its graphs


class DecodeGraphs:
    """The captured steps of one model, with the memory that they use, until `clear`."""

    def __init__(self, *, refusal: str = "") -> None:
        """With `refusal`, the reason why this model cannot be captured, it never is."""
        self._kept: FixedSlots | None = None
        self._refusal, self._is_logged = refusal, False
        self._stream: Any = None

    def slots(
        self, model: PreTrainedModel, waiting: WaitingPrompts, *, outputs: Outputs, limit: int
    ) -> FixedSlots | None:
        """Slots for this queue, with earlier graphs where they fit; None where the model is to decode eagerly.

        What they draw is in their own `outputs`, which may be earlier ones like `outputs`.
        """
        if outputs.length == 1:  # the only token comes from the prompt's forward
            return None
        reason = self._refusal or why_not(model)
        if reason:
            self.refuse(model, reason)
            self.clear()
            return None
        longest, kept = max(waiting.lengths) + outputs.length, self._kept
        if kept is not None and kept.fits(model, outputs, limit=min(limit, len(waiting)), longest=longest):
            kept.restart(waiting)
            return kept
        self._kept = kept = None  # its memory goes first
        self._kept = FixedSlots(model, waiting, outputs, limit=limit, graphs=self)
        return self._kept

    def refuse(self, model: PreTrainedModel, reason: str) -> None:
        """Decode eagerly from the next queue on; the log says why, once."""
        if not self._is_logged:
            log.warning("%s decodes without CUDA graphs: %s", type(model).__name__, reason)
        self._refusal, self._is_logged = reason, True

    def stream(self, device: torch.device) -> Any:
        """The stream of every capture: cuBLAS keeps a workspace for each stream that it has seen."""
        self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._stream

    def clear(self) -> None:
        """Free graphs, cache and outputs."""
        self._kept = None


def why_not(model: PreTrainedModel) -> str:
    """The reason why steps of this model cannot have fixed shapes; empty where they can."""
    if not serves(model.config):
        return "its layers keep more than keys and values"
    # Some attention takes the last column of the cache for the newest token, without asking for a mask.
    fixed = getattr(model, "_can_compile_fullgraph", False)
    return "" if fixed else "transformers does not run it with a cache of fixed shape"


class FixedSlots(Slots):
    """Slots whose decode steps have fixed shapes and addresses, and draw their tokens themselves."""

    _cache: FixedCache

    def __init__(
        self, model: PreTrainedModel, waiting: WaitingPrompts, outputs: Outputs, *, limit: int, graphs: DecodeGraphs
    ) -> None:
        """N slots, at most `limit`, whose rows are written to `outputs`; graphs that cannot be captured are refused."""
        super().__init__(model, waiting, limit=limit, new=outputs.length, pad_id=outputs.pad_id)
        self.outputs = outputs
        self._graphs, self._captured = graphs, dict[tuple[int, int], Any]()
        self._captures = self._device.type == "cuda"
        self._stream: Any = graphs.stream(self._device) if self._captures else None
        self._pool: Any = torch.cuda.graph_pool_handle() if self._captures else None
        self._over = torch.zeros(self._limit, dtype=torch.bool, device=self._device)  # since they were last free
        self._flags = torch.zeros(self._limit, dtype=torch.bool, pin_memory=self._captures)  # a copy, some steps old
        self._copied: Any = torch.cuda.Event() if self._captures else None  # type: ignore[no-untyped-call]
        self._asked = [False] * self._limit  # slots of which the copy tells something new
        self._left = [0] * self._limit  # tokens that may follow in each slot
        self._addresses: list[int] = []  # of the weights that the graphs read

    def fits(self, model: PreTrainedModel, outputs: Outputs, *, limit: int, longest: int) -> bool:
        """Whether another queue can be decoded in this memory, by the same steps."""
        alike = self.outputs.settings == outputs.settings and self._limit == limit
        return model is self._model and alike and longest <= self._cache.capacity

    def restart(self, waiting: WaitingPrompts) -> None:
        """Take another queue of as many prompts."""
        self._waiting, self._prefilled, self._taken = waiting, None, [False] * self._limit
        self._host_lengths, self._left = [0] * self._limit, [0] * self._limit
        self._free(slice(None))
        self._asked = [False] * self._limit
        if self._captured and self._weights() != self._addresses:  # they were gathered, or loaded, to other places
            self._captured.clear()

    def idle(self) -> None:
        """Nothing: no other rank waits for a forward of this one."""

    def _new_cache(self, longest: int) -> FixedCache:
        return FixedCache(self._model.config, slots=self._limit, capacity=-(-longest // _ROUND) * _ROUND)

    def _copy(self, prompts: Prefilled, lengths: list[int], *, slots: list[int], is_last: bool) -> None:
        where, sources = self._tensor(slots), self._tensor(prompts.sources)
        self._cache.place(prompts.cache, sources, slots=where, lengths=self._tensor(lengths), is_last=is_last)
        self._over[where] = False
        for slot in slots:
            self._left[slot], self._asked[slot] = self.outputs.length - 1, False

    def _decode(self) -> None:
        """A few steps, then what the host learns of the rows that ended before them."""
        for _ in range(min(_STEPS, max(self._left))):
            self._host_lengths = [length + 1 for length in self._host_lengths]
            self._left = [max(left - 1, 0) for left in self._left]
            self._run(len(self._taken), self._columns)
        over = self._noticed()
        state = zip(self._taken, self._left, over, strict=True)
        self._taken = [taken and left > 0 and not is_over for taken, left, is_over in state]
        self._left = [left if taken else 0 for taken, left in zip(self._taken, self._left, strict=True)]
        self._refill()
        # Not waited for here: the next steps are queued behind it before the host looks at the copy.
        self._flags[: len(self._taken)].copy_(self._over[: len(self._taken)], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._asked = list(self._taken)

    def _noticed(self) -> list[bool]:
        """Which slots had ended before the last few steps, which the device may still be busy with."""
        if self._copied is not None:
            self._copied.synchronize()  # the only wait for the device while rows are decoded
        flags: list[bool] = self._flags[: len(self._taken)].tolist()
        return [asked and flag for asked, flag in zip(self._asked, flags, strict=True)]

    def _drop_ended(self) -> None:
        """Halve the slots as often as the rows that are left allow; they move to the front."""
        count, before = self._taken.count(True), len(self._taken)
        after = before
        while after > _ROWS and count <= -(-after // 2):
            after = -(-after // 2)
        if count == 0 or after == before:
            return
        slots = [slot for slot, taken in enumerate(self._taken) if taken]
        stay = self._tensor(slots)
        self._cache.reorder_cache(stay)
        for kept in (self._tokens, self._lengths, self._starts, self._rows, self._over):
            kept[:count] = kept[stay]  # the right side is a copy
        self._free(slice(count, after))
        empty = [0] * (after - count)
        self._taken = [slot < count for slot in range(after)]
        self._host_lengths = [self._host_lengths[slot] for slot in slots] + empty
        self._left = [self._left[slot] for slot in slots] + empty
        self._asked = [False] * after  # a copy on its way has the old order; the next one tells the same

    def _free(self, slots: slice) -> None:
        for kept in (self._lengths, self._starts, self._tokens, self._over):
            kept[slots] = 0
        self._rows[slots] = self._no_row

    @property
    def _columns(self) -> int:
        """Columns that hold every row after the next step."""
        needed = max(n for n, taken in zip(self._host_lengths, self._taken, strict=True) if taken)
        return min(self._cache.capacity, max(_COLUMNS, 1 << (needed - 1).bit_length()))

    def _run(self, n: int, columns: int) -> None:
        if self._captures and (n, columns) not in self._captured:
            try:
                self._captured[n, columns] = self._capture(n, columns)
            except RuntimeError as error:
                first = error.__context__ or error  # the end of a capture that failed is an error of its own
                self._graphs.refuse(self._model, f"{type(first).__name__}: {(str(first).splitlines() or [''])[0]}")
                self._captures = False
                self._captured.clear()
        if self._captures:
            self._captured[n, columns].replay()
        else:
            self._step(n, columns)

    def _capture(self, n: int, columns: int) -> torch.cuda.CUDAGraph:
        """Capture a step, which is not run by that."""
        state = [self._tokens, self._lengths, self._starts, self._rows, self._over]
        before, graph = [kept.clone() for kept in state], torch.cuda.CUDAGraph()
        debugging = torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            # A warm-up, on the stream of the capture: libraries allocate their workspaces, and whatever would wait for
            # the device says so while an error does no harm. Repeated, a step writes the same to the same places.
            with warnings.catch_warnings(), torch.cuda.stream(self._stream):
                warnings.simplefilter("ignore")  # the mode is said to be a prototype
                torch.cuda.set_sync_debug_mode("error")
                self._step(n, columns)
        finally:
            torch.cuda.set_sync_debug_mode(debugging)
            torch.cuda.current_stream().wait_stream(self._stream)
            for kept, value in zip(state, before, strict=True):
                kept.copy_(value)
        # Graphs share a pool: never two run at once, and what a step leaves lies outside. Other threads may allocate.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._step(n, columns)
        self._addresses = self._weights()
        return graph

    def _step(self, n: int, columns: int) -> None:
        """Read the last token of the first n rows, and draw and keep the next; nothing here waits for the device."""
        state = self._tokens, self._lengths, self._starts, self._rows, self._over
        tokens, lengths, starts, rows, over = (kept[:n] for kept in state)
        lengths += 1
        positions = lengths - 1
        self._cache.show(positions, columns=columns)
        mask = torch.arange(columns, device=self._device) < lengths[:, None]  # [n, columns]
        logits = self._forward(tokens[:, None], mask, positions=positions[:, None], cache=self._cache)  # [n, V]
        drawn, ended = self.outputs.draw(Step(rows, lengths - starts, logits), is_static=True)
        tokens.copy_(drawn)
        over |= ended
        rows.masked_fill_(ended, self._no_row)  # a free slot goes on, and writes into the row of nobody
        lengths.masked_fill_(ended, 0)
        starts.masked_fill_(ended, 0)

    def _weights(self) -> list[int]:
        return [tensor.data_ptr() for tensor in chain(self._model.parameters(), self._model.buffers())]
