"""Finds what a computation allocates by running its own code on tensors without values.

A model of any architecture is built on meta from its configuration alone, and runs forward and backward (or decodes)
under fake tensors, which have shapes, types, strides and storages but no memory. Every storage is counted from when it
is made until the last tensor on it is gone. So saved activations, the loss's temporaries and what activation
checkpointing computes again are those of the real code.

Each part of the computation has its own count: before the blocks, in the first, in those between and in the last of
them, after them, and the same in backward. Blocks are alike in most models; then two short models, of three and of four
blocks, give every part of a model of any depth exactly, since each grows by the same bytes with every block.

Not seen: parameters and buffers (`states.py`), their gradients once they are complete, private workspaces of kernels,
and what the allocator loses. Fake tensors say that they are on the CPU whatever the plan is for: CUDA's attention
kernels save the same tensors, and a workload chooses the chunks of the loss itself.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rlhf.config.engine_config import Attention
from rlhf.config.run_config import Embedded
from rlhf.config.stage_configs import LoraConfig, ModelKind
from rlhf.models.causal_lm import causal_lm_module
from rlhf.models.embedded import embedded_config
from rlhf.models.model_folder import local_folder
from rlhf.models.model_spec import (
    ModelSpec,
    assemble,
    decoder_config,
    enable_activation_checkpointing,
    first_layers,
    with_dropout,
)
from rlhf.models.scalar_head import ScalarHeadModel, classifier_module

ACTIVATIONS, LOGITS, CACHE = "activations", "logits and loss", "KV cache"
DECODING_CALLS = 2
"""Forwards of a traced generation: the prompt and one token after it. Later tokens take no more."""

Computation = Callable[[nn.Module], Tensor | None]
"""Runs a model on a batch that it makes itself; what it returns is run backward."""


@dataclass(frozen=True)
class ModelShape:
    """A model without weights, which need not exist anywhere; equal shapes take equal memory."""

    source: str | Embedded
    """A folder with a `config.json`, a hub id, of which nothing else is fetched, or an embedded model."""
    kind: ModelKind
    num_layers: int = 0
    """How many of its layers are used; 0 uses all."""
    dropout: float = 0.0
    """Every dropout probability of it."""
    lora: LoraConfig | None = None
    """Its adapters, of a rank above 0; None for a model without."""
    attention: Attention | None = None
    """Implementation of its attention; None is transformers' choice, which stands for flash, too."""

    def __hash__(self) -> int:
        return hash(repr(self))  # settings have no hash

    @property
    def runs(self) -> tuple[int, int]:
        """How many blocks lie below those with adapters of their own, and how many others there are."""
        depth = self.num_layers or int(_config(self.source).num_hidden_layers)
        top = self.lora.top_layers if self.lora is not None else 0
        return (depth - top, top) if top else (0, depth)

    @property
    def whole(self) -> ModelSpec:
        """The model itself, on meta; shared, so not to be changed."""
        return _built(self, self.runs)

    @property
    def is_regular(self) -> bool:
        """Whether the blocks of each run are alike, so that short runs say what long ones take."""
        spec, lower = self.whole, self.runs[0]
        blocks = [[(name, p.shape, p.requires_grad) for name, p in block.named_parameters()] for block in spec.blocks]
        settings = spec.config.to_dict().values()  # a list of this length has one value for each block
        per_block = [blocks, *(value for value in settings if isinstance(value, list) and len(value) == len(blocks))]
        return all(value == run[0] for values in per_block for run in (values[:lower], values[lower:]) for value in run)

    def build(self, runs: tuple[int, int]) -> ModelSpec:
        """A model of the caller's own whose runs have so many blocks."""
        return copy.deepcopy(_built(self, runs))  # quicker than building it


@lru_cache(maxsize=64)
def _built(shape: ModelShape, runs: tuple[int, int]) -> ModelSpec:
    config = first_layers(with_dropout(_config(shape.source), shape.dropout), sum(runs))
    module: nn.Module
    if shape.kind is ModelKind.causal_lm:
        module = causal_lm_module(config, shape.attention)
    else:
        config.num_labels = 1
        module = ScalarHeadModel(classifier_module(config, shape.attention), config)
    lora = shape.lora and replace(shape.lora, top_layers=runs[1] if runs[0] else 0)
    nothing: Any = None  # only the shape is ever asked for, so there are no weights
    return assemble(module, nothing, config=config, new={}, lora=lora, seed=0, dropout=shape.dropout)


@lru_cache(maxsize=16)
def _config(source: str | Embedded) -> Any:  # transformers is behind `rlhf.models`
    return (
        embedded_config(source) if isinstance(source, Embedded) else decoder_config(local_folder(source, weights=False))
    )


class TracePoint(NamedTuple):
    """A point of a computation."""

    call: int
    """The forward of the model that it belongs to, from 0."""
    backward: bool
    place: str
    """before, first, inner or last of the blocks; between lies after forward's last and before backward's last."""


@dataclass(frozen=True)
class TracedMemory:
    """The bytes that are live at the peak of a part of a computation, and the point where it begins."""

    point: TracePoint
    bytes: dict[str, int]
    """By tag: activations, logits and loss, KV cache."""
    per_block: int = 0
    """What one block more would add; 0 also where the blocks differ."""

    @property
    def total(self) -> int:
        """The bytes of all tags."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Mode:
    """The state in which a model is traced."""

    dtype: torch.dtype
    """Type of the working weights."""
    training: bool = False
    """Training mode, else eval mode without gradients."""
    recomputes: bool = False
    """Activation checkpointing is on."""
    decoding_rows: int = 0
    """Rows of the batch that is generated; 0 where nothing is. Code that reads a count from a tensor is told this."""


class EnoughError(Exception):
    """Ends the traced work early: everything of interest has been counted."""


@lru_cache(maxsize=256)
def trace(shape: ModelShape, *, work: Computation, mode: Mode) -> list[TracedMemory]:
    """The parts of `work` on a model, in the order in which they begin; remembered, so not to be changed."""

    def traced(runs: tuple[int, int]) -> list[TracedMemory]:
        return trace_once(shape.build(runs), work, mode=mode)

    lower, upper = shape.runs
    if not shape.is_regular:
        return traced(shape.runs)
    short = (min(lower, 1), min(upper, 3))
    parts = base = traced(short)
    for run, more in enumerate((lower - short[0], upper - short[1])):
        # A block leaves tensors to later parts in a cache, for backward (the lower run is frozen), or where the
        # configuration asks for all hidden states. Where it does not, a deeper model takes no more.
        leaves = mode.decoding_rows or (mode.training and run == 1) or shape.whole.config.output_hidden_states
        if more and leaves:
            longer = traced((short[0] + (run == 0), short[1] + (run == 1)))
            assert [part.point for part in base] == [part.point for part in longer], "blocks differ"
            grown = zip(parts, base, longer, strict=True)
            parts = [_deeper(found, short=a, longer=b, more=more) for found, a, b in grown]
    return parts


def _deeper(found: TracedMemory, *, short: TracedMemory, longer: TracedMemory, more: int) -> TracedMemory:
    """`found` with `more` times what `longer` has beyond `short`."""
    tags = sorted({*found.bytes, *short.bytes, *longer.bytes})
    total = {tag: found.bytes.get(tag, 0) + more * (longer.bytes.get(tag, 0) - short.bytes.get(tag, 0)) for tag in tags}
    return TracedMemory(found.point, total, per_block=max(found.per_block, longer.total - short.total))


def trace_once(spec: ModelSpec, work: Computation, *, mode: Mode) -> list[TracedMemory]:
    """The parts of `work` on this very model, which is used up: its parameters become fake and get hooks."""
    module = spec.module
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        _make_fake(module, fake, dtype=mode.dtype)
        module.train(mode.training)
        if mode.recomputes:
            enable_activation_checkpointing(module)
        counter = _Counter([*module.parameters(), *module.buffers()], answer=mode.decoding_rows or 1)
        _Signposts(spec, counter, max_calls=DECODING_CALLS if mode.decoding_rows else None)
        with counter, torch.set_grad_enabled(mode.training), suppress(EnoughError):
            loss = work(module)
            if loss is not None and mode.training:
                loss.backward()  # type: ignore[no-untyped-call]
    return counter.parts()


def _make_fake(module: nn.Module, fake: FakeTensorMode, *, dtype: torch.dtype) -> None:
    made: dict[int, nn.Parameter] = {}  # by id, so that tied parameters stay tied
    for part in module.modules():
        for key, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=dtype, device="cpu")
                made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            part.register_parameter(key, made[id(parameter)])
        for key, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            setattr(part, key, fake.from_tensor(buffer))


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the live bytes of storages made inside it, by tag and by part of the computation."""

    def __init__(self, known: list[Tensor], *, answer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._answer = answer
        self._known = known  # kept alive: a storage that is made must not get the address of one of theirs
        self._storages: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}
        self._tag_of: dict[int, str] = {}
        self._live: dict[str, int] = {}
        self._tag = ACTIVATIONS
        self.here = TracePoint(-1, False, "before")  # the batch is made
        """The part of the computation that is running."""
        self._peaks: dict[TracePoint, dict[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # Code reads a number out of a tensor. A mask is not all True, for some row is padded.
            return False if args[0].dtype == torch.bool else self._answer
        if func is torch.ops.aten.nonzero.default:  # at most, all tokens of a mask count
            kwargs, args = {"dtype": torch.int64}, ((args[0].numel(), args[0].dim()),)
            func = torch.ops.aten.empty.memory_format
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value)
        return out

    def enter(self, call: int, place: str, *, tag: str, backward: bool = False) -> None:
        """A part of the computation begins; new storages get `tag`."""
        self.here, self._tag = TracePoint(call, backward, place), tag
        self._note()

    def retag(self, old: str, new: str) -> None:
        """Live storages tagged `old` are `new` from here on."""
        for key, tag in self._tag_of.items():
            if tag == old:
                self._tag_of[key] = new
        self._live[new] = self._live.get(new, 0) + self._live.pop(old, 0)

    def parts(self) -> list[TracedMemory]:
        """The peak of each part, in the order in which they began."""
        return [TracedMemory(point, dict(peak)) for point, peak in self._peaks.items()]

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        # The last tensor on a storage frees it: the reference must not keep it alive, and tells when it goes.
        self._storages[key] = weakref.ref(storage, lambda _: self._remove(key, size))
        self._tag_of[key] = self._tag
        self._live[self._tag] = self._live.get(self._tag, 0) + size
        self._note()

    def _remove(self, key: int, size: int) -> None:
        del self._storages[key]
        self._live[self._tag_of.pop(key)] -= size

    def _note(self) -> None:
        peak = self._peaks.setdefault(self.here, {})
        if sum(self._live.values()) >= sum(peak.values()):
            self._peaks[self.here] = dict(self._live)


class _Signposts:
    """Hooks on a model that tell the counter where the computation is."""

    def __init__(self, spec: ModelSpec, counter: _Counter, *, max_calls: int | None) -> None:
        self._counter = counter
        self._max_calls = max_calls
        self._last = len(spec.blocks) - 1
        spec.module.register_forward_pre_hook(self._begin)
        for index, block in enumerate(spec.blocks):
            block.register_forward_pre_hook(partial(self._enter, index=index))
            block.register_forward_hook(partial(self._leave, index=index))
        for parameter in spec.module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]

    def _begin(self, module: nn.Module, args: Any) -> None:
        call = self._counter.here.call
        if call + 1 == self._max_calls:
            raise EnoughError
        if call >= 0 and not torch.is_grad_enabled():  # what outlives a forward is the cache
            self._counter.retag(ACTIVATIONS, CACHE)
            self._counter.retag(LOGITS, CACHE)
        self._counter.enter(call + 1, "before", tag=ACTIVATIONS)

    def _enter(self, block: nn.Module, args: Any, *, index: int) -> None:
        if _in_backward():  # activation checkpointing computes the block again
            return
        self._counter.enter(self._counter.here.call, self._place(index), tag=ACTIVATIONS)
        if index == 0:
            self._mark_backward(args[0], "before")

    def _leave(self, block: nn.Module, *arguments: Any, index: int) -> None:
        if _in_backward():
            return
        output = arguments[-1]
        self._mark_backward(output if isinstance(output, Tensor) else output[0], self._place(index))
        if index == self._last:
            self._counter.enter(self._counter.here.call, "between", tag=LOGITS)

    def _mark_backward(self, hidden: Tensor, place: str) -> None:
        """Backward enters a block when the gradient of its output is there, and leaves the first with its input's."""

        def enter(gradient: Tensor) -> None:
            self._counter.enter(self._counter.here.call, place, backward=True, tag=ACTIVATIONS)

        if hidden.requires_grad:
            hidden.register_hook(enter)  # type: ignore[no-untyped-call]

    def _place(self, index: int) -> str:
        return "last" if index == self._last else "inner" if index else "first"


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() >= 0


def _drop_gradient(parameter: Tensor) -> None:
    """Complete gradients are counted in `states.py`."""
    parameter.grad = None
