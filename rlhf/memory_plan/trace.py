"""What a computation allocates, found by running its own code on tensors without values.

A model of any architecture runs forward and backward (or decodes) under fake tensors, which have shapes, types, strides
and storages but no memory, and every storage that is made is counted until the last tensor on it is gone. So saved
activations, the loss's temporaries and what activation checkpointing computes again are those of the real code.

The count is kept for each stretch of the computation: before the blocks, in the first, in those between and in the
last of them, after them, and the same in backward. Blocks are alike in most models; then two short models, of three and
of four blocks, give every stretch of a model of any depth exactly, since each grows by the same bytes per block.

Not seen: parameters and buffers (`states.py`), their gradients once they are complete, private workspaces of
kernels, and what the allocator loses. Fake tensors say they are on the CPU whatever the plan is for: CUDA's attention
kernels save the same tensors.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rlhf.algorithms import logprobs
from rlhf.models.model_spec import ModelSpec

ACTIVATIONS, LOGITS, CACHE = "activations", "logits and loss", "KV cache"
SHORT, SUM = (1, 3), 3  # blocks of two runs, or of one, that stand for longer ones, together with one more

Work = Callable[[nn.Module], Tensor | None]
"""Runs a model on a batch; what it returns is run backward."""


class Where(NamedTuple):
    """A part of a computation."""

    call: int
    """Which forward of the model it belongs to, from 0."""
    backward: bool
    place: str
    """before, first, inner or last of the blocks; between lies after forward's last and before backward's last."""


@dataclass(frozen=True)
class Stretch:
    """What was live at the peak of a part of a computation."""

    where: Where
    bytes: dict[str, int]
    """Of each tag."""
    per_block: int = 0
    """What one block more would add to it; 0 also where the blocks differ."""

    @property
    def total(self) -> int:
        """All tags."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Prepare:
    """How a model is brought into the state in which it is traced."""

    dtype: torch.dtype
    """Of the working weights."""
    training: bool
    """Training mode, else eval mode without gradients."""
    cuda: bool = False
    """The plan is for a CUDA device."""
    on_module: Callable[[nn.Module], None] | None = None
    """Done to the module first, such as switching on activation checkpointing."""
    answer: int = 1
    """What code finds that reads a whole number out of a tensor, such as how many rows still speak."""
    max_calls: int = sys.maxsize
    """Forwards of the model after which the trace ends."""


class EnoughError(Exception):
    """Ends the work that is traced: what is wanted has been seen."""


class Family(Protocol):
    """A model of which shorter ones can be made; hashable, and equal to what makes the same models."""

    @property
    def runs(self) -> tuple[int, int]:
        """Its blocks, in two runs of which one may be empty."""

    @property
    def is_regular(self) -> bool:
        """Whether the blocks of a run are alike."""

    def with_runs(self, lower: int, upper: int) -> ModelSpec:
        """One with so many blocks in its runs."""


@lru_cache(maxsize=256)
def trace(family: Family, *, work: Work, prepare: Prepare) -> list[Stretch]:
    """The stretches of `work` on a model, in the order in which they begin; remembered, so not to be changed.

    Args:
        family: the model.
        work: what is run; it makes its own batch.
        prepare: type and mode of the model.
    """

    def traced(*runs: int) -> list[Stretch]:
        return _traced(family.with_runs(*runs), work, prepare=prepare)

    runs = family.runs
    if not family.is_regular:
        return traced(*runs)
    short = [min(count, most) for count, most in zip(runs, SHORT if all(runs) else (SUM, SUM), strict=True)]
    stretches = base = traced(*short)
    for number, count in enumerate(runs):
        if count > short[number]:
            longer = traced(*(length + (index == number) for index, length in enumerate(short)))
            assert [stretch.where for stretch in base] == [stretch.where for stretch in longer], "blocks differ"
            grown = zip(stretches, base, longer, strict=True)
            stretches = [_deeper(found, short=a, longer=b, more=count - short[number]) for found, a, b in grown]
    return stretches


def _deeper(found: Stretch, *, short: Stretch, longer: Stretch, more: int) -> Stretch:
    """`found` with `more` times what `longer` has beyond `short`."""
    tags = sorted({*found.bytes, *short.bytes, *longer.bytes})
    total = {tag: found.bytes.get(tag, 0) + more * (longer.bytes.get(tag, 0) - short.bytes.get(tag, 0)) for tag in tags}
    per_block = max(found.per_block, longer.total - short.total)
    return Stretch(found.where, total, per_block)


def _traced(spec: ModelSpec, work: Work, *, prepare: Prepare) -> list[Stretch]:
    module = spec.module
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, _chunks_of_a_gpu(prepare.cuda):
        _make_fake(module, fake, dtype=prepare.dtype)
        module.train(prepare.training)
        if prepare.on_module is not None:
            prepare.on_module(module)
        counter = _Counter([*module.parameters(), *module.buffers()], answer=prepare.answer)
        _Signposts(spec, counter, max_calls=prepare.max_calls)
        with counter, torch.set_grad_enabled(prepare.training), suppress(EnoughError):
            loss = work(module)
            if loss is not None and prepare.training:
                loss.backward()
    return counter.stretches()


@contextmanager
def _chunks_of_a_gpu(wanted: bool) -> Iterator[None]:
    """The loss works through logits in larger pieces on CUDA, which fake tensors do not say they are on."""
    usual = logprobs.CPU_CHUNK_ELEMENTS
    logprobs.CPU_CHUNK_ELEMENTS = logprobs.CHUNK_ELEMENTS if wanted else usual
    try:
        yield
    finally:
        logprobs.CPU_CHUNK_ELEMENTS = usual


def _make_fake(module: nn.Module, fake: FakeTensorMode, *, dtype: torch.dtype) -> None:
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for key, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=dtype, device="cpu")
                made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            part.register_parameter(key, made[id(parameter)])
        for key, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            setattr(part, key, fake.from_tensor(buffer))


class _Counter(TorchDispatchMode):
    """Counts the live bytes of storages made inside it, by tag and by stretch."""

    def __init__(self, known: list[Tensor], *, answer: int) -> None:
        super().__init__()
        self._answer = answer
        self._known = known  # kept alive: their storages' addresses must not be used again
        self._storages: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}
        self._tag_of: dict[int, str] = {}
        self._live: dict[str, int] = {}
        self._tag = ACTIVATIONS
        self._here = Where(-1, False, "before")  # the batch is made
        self._peaks: dict[Where, dict[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # Code reads a number out of a tensor. A mask is not all True, for somebody pads.
            return False if args[0].dtype == torch.bool else self._answer
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value)
        return out

    def enter(self, call: int, place: str, *, tag: str, backward: bool = False) -> None:
        """A stretch begins."""
        self._here, self._tag = Where(call, backward, place), tag
        self._note()

    def retag(self, old: str, new: str) -> None:
        """What is live as `old` is called `new` from here on."""
        for key, tag in self._tag_of.items():
            if tag == old:
                self._tag_of[key] = new
        self._live[new] = self._live.get(new, 0) + self._live.pop(old, 0)

    @property
    def call(self) -> int:
        """The model's forward that is running or has run."""
        return self._here.call

    def stretches(self) -> list[Stretch]:
        """In the order in which they began."""
        return [Stretch(where, dict(peak)) for where, peak in self._peaks.items()]

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, lambda _: self._remove(key, size))
        self._tag_of[key] = self._tag
        self._live[self._tag] = self._live.get(self._tag, 0) + size
        self._note()

    def _remove(self, key: int, size: int) -> None:
        del self._storages[key]
        self._live[self._tag_of.pop(key)] -= size

    def _note(self) -> None:
        peak = self._peaks.setdefault(self._here, {})
        if sum(self._live.values()) >= sum(peak.values()):
            self._peaks[self._here] = dict(self._live)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() >= 0


class _Signposts:
    """Hooks on a model that tell the counter where the computation is."""

    def __init__(self, spec: ModelSpec, counter: _Counter, *, max_calls: int) -> None:
        self._counter = counter
        self._max_calls = max_calls
        self._last = len(spec.blocks) - 1
        spec.module.register_forward_pre_hook(self._begin)
        for index, block in enumerate(spec.blocks):
            block.register_forward_pre_hook(partial(self._enter, index=index))
            block.register_forward_hook(partial(self._leave, index=index))
        for parameter in spec.module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_forget)

    def _begin(self, module: nn.Module, args: Any) -> None:
        call = self._counter.call
        if call + 1 == self._max_calls:
            raise EnoughError
        if call >= 0:  # what outlives a forward that nothing is learnt from is the cache
            self._counter.retag(ACTIVATIONS, CACHE)
            self._counter.retag(LOGITS, CACHE)
        self._counter.enter(call + 1, "before", tag=ACTIVATIONS)

    def _enter(self, block: nn.Module, args: Any, *, index: int) -> None:
        if _in_backward():  # the block is computed again
            return
        self._counter.enter(self._counter.call, self._place(index), tag=ACTIVATIONS)
        if index == 0:
            self._mark_backward(args[0], "before")

    def _leave(self, block: nn.Module, *arguments: Any, index: int) -> None:
        if _in_backward():
            return
        output = arguments[-1]
        self._mark_backward(output if isinstance(output, Tensor) else output[0], self._place(index))
        if index == self._last:
            self._counter.enter(self._counter.call, "between", tag=LOGITS)

    def _mark_backward(self, hidden: Tensor, place: str) -> None:
        if hidden.requires_grad:
            hidden.register_hook(
                lambda _: self._counter.enter(self._counter.call, place, backward=True, tag=ACTIVATIONS)
            )

    def _place(self, index: int) -> str:
        if index == self._last:
            return "last"
        return "inner" if index else "first"


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() >= 0


def _forget(parameter: Tensor) -> None:
    """A complete gradient is counted by `states.py`."""
    parameter.grad = None
