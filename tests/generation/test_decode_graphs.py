"""Decode steps of fixed shapes say what those of growing ones say; on a GPU, captured, too."""

import logging
from contextlib import contextmanager
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPTNeoConfig

from rlhf.config.stage_configs import SamplingConfig
from rlhf.generation import decode_graphs
from rlhf.generation import sampling as sampling_module
from rlhf.generation.decode_graphs import DecodeGraphs, FixedSlots
from rlhf.generation.generate import Decoding, generate
from rlhf.generation.outputs import Outputs
from rlhf.generation.waiting import WaitingPrompts
from tests.generation.test_generate import FAMILIES, GREEDY, NEW, SAMPLED
from tests.generation.test_queue import LENGTHS, Forwards, queue, unequal_stops
from tests.models import tiny

SAMPLING = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "top-k": SamplingConfig(top_k=7),
    "top-p": SamplingConfig(temperature=1.2, top_p=0.8),
    "both": SamplingConfig(top_k=20, top_p=0.9),
}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.fixture(autouse=True)
def many_shapes(monkeypatch):
    """Small batches and short sequences go through several shapes, and growing steps look at few tokens first."""
    monkeypatch.setattr(sampling_module, "_FEW", 8)
    monkeypatch.setattr(decode_graphs, "_COLUMNS", 8)
    monkeypatch.setattr(decode_graphs, "_ROWS", 1)


def said(model, prompts, *, graphs=None, slots=None, stops=(), sampling=SAMPLED, new=NEW, seed=1):
    decoding = Decoding(new, stops, pad_id=tiny.PAD, sampling=sampling, slots=slots, graphs=graphs)
    return generate(model, prompts, decoding=decoding, seed=seed)


def assert_same(found, expected):
    assert torch.equal(found.responses, expected.responses)
    assert torch.equal(found.response_mask, expected.response_mask)
    assert torch.equal(found.ended, expected.ended)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)


def pair(model, prompts, graphs, **settings):
    return said(model, prompts, graphs=graphs, **settings), said(model, prompts, **settings)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [1, 3, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_shapes_say_what_growing_ones_say(family, slots, device):
    model, prompts = tiny.model(family).to(device), queue().to(torch.device(device))
    stops = unequal_stops(model, prompts)
    found, expected = pair(model, prompts, DecodeGraphs(), slots=slots, stops=stops)
    assert found.response_mask.sum(-1).unique().numel() > 3
    assert_same(found, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_every_kind_of_sampling_draws_the_same(sampling, device):
    model, prompts = tiny.model("llama").to(device), queue(copies=2).to(torch.device(device))
    stops = unequal_stops(model, prompts, sampling)
    assert_same(*pair(model, prompts, DecodeGraphs(), sampling=sampling, slots=5, stops=stops))


@pytest.mark.parametrize("device", DEVICES)
def test_columns_and_rows_have_a_graph_each_and_the_next_queue_finds_them(device, monkeypatch):
    model, graphs = tiny.model("gemma3").to(device), DecodeGraphs()
    shapes = []
    step = decode_graphs.FixedSlots._step

    def counted(self, n, columns):
        shapes.append((n, columns))
        step(self, n, columns)

    monkeypatch.setattr(decode_graphs.FixedSlots, "_step", counted)
    prompts = queue([40, 3, 17, 2, 9, 6, 5, 5]).to(torch.device(device))
    stops = [int(said(model, prompts, new=60).responses[1, 30])]
    assert_same(*pair(model, prompts, graphs, slots=6, new=60, stops=stops))
    assert {6} < {n for n, _ in shapes} <= {6, 3, 2, 1}
    assert {columns for _, columns in shapes} == {32, 64, 128}
    kept = graphs._kept
    shapes.clear()
    assert_same(*pair(model, prompts, graphs, slots=6, new=60, stops=stops, seed=2))
    assert graphs._kept is kept
    if device == "cuda":
        assert not shapes
        assert len(kept._captured) > 2


def test_answers_belong_to_the_caller():
    model, prompts, graphs = tiny.model("gpt2"), queue(), DecodeGraphs()
    first = said(model, prompts, graphs=graphs)
    before = first.responses.clone()
    said(model, prompts, graphs=graphs, seed=2)
    assert torch.equal(first.responses, before)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_change_in_place_or_move_are_those_that_answer(device):
    model, prompts, graphs = tiny.model("llama").to(device), queue().to(torch.device(device)), DecodeGraphs()
    said(model, prompts, graphs=graphs)
    with torch.no_grad():
        model.model.embed_tokens.weight.neg_()
    assert_same(*pair(model, prompts, graphs))
    captured = graphs._kept._captured
    captured[0, 0] = "of the old addresses"
    graphs._kept._addresses = graphs._kept._weights()
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.neg()
    found, expected = pair(model, prompts, graphs)
    assert (0, 0) not in captured
    assert_same(found, expected)


def test_a_row_that_diverges_leaves_the_next_one_in_its_slot_alone():
    model, prompts = tiny.model("mistral"), queue([6, 5, 4])
    bad = int(prompts.input_ids[0, -6])
    assert not prompts.input_ids[1:].eq(bad).any()
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = torch.nan
    found, expected = pair(model, prompts, DecodeGraphs(), slots=1, new=9)
    assert found.logprobs[0].isnan().all()
    assert torch.equal(found.responses[1:], expected.responses[1:])
    assert torch.allclose(found.logprobs[1:], expected.logprobs[1:], atol=1e-4)


@pytest.mark.parametrize("slots", [1, 4, None])
def test_all_rows_may_end_at_once(slots):
    model, prompts = tiny.model("mistral"), queue()
    first = said(model, prompts).responses[:, 0].unique().tolist()
    found = said(model, prompts, graphs=DecodeGraphs(), slots=slots, stops=first)
    assert found.responses.shape == (len(LENGTHS), 1)
    assert found.ended.all()


def test_few_steps_are_wasted_on_rows_that_ended():
    model, prompts = tiny.model("llama"), queue([5, 6, 7] * 16)
    stops = sorted(set(said(model, prompts, new=100).responses[:4, 30].tolist()))
    forwards = Forwards(model)
    found = said(model, prompts, graphs=DecodeGraphs(), slots=8, stops=stops, new=100)
    decoded = [rows for rows, columns in forwards.stop() if columns == 1]
    lengths = found.response_mask.sum(-1)
    late = 2 * decode_graphs._STEPS - 1
    # Each row may be noticed late; at the end, less than half of the slots are taken for no longer than a response.
    assert sum(decoded) <= int((lengths - 1).sum()) + late * len(lengths) + 8 * int(lengths.max())


def test_a_model_that_cannot_be_captured_says_why_once_and_answers(caplog):
    torch.manual_seed(0)
    local = GPTNeoConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["local"], 2]],
        window_size=4,
    )
    for model, graphs, reason in [
        (tiny.model("states"), DecodeGraphs(), "its layers keep more than keys and values"),
        (
            AutoModelForCausalLM.from_config(local).eval(),
            DecodeGraphs(),
            "transformers does not run it with a cache of fixed shape",
        ),
        (tiny.model("llama"), DecodeGraphs(refusal="it is streamed"), "it is streamed"),
    ]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            for _ in range(2):
                assert_same(*pair(model, queue(), graphs, slots=3))
        lines = [record.message for record in caplog.records if "CUDA graphs" in record.message]
        assert lines == [f"{type(model).__name__} decodes without CUDA graphs: {reason}"]


def test_an_error_at_capture_is_logged_with_its_first_line_and_the_queue_is_answered(monkeypatch, caplog):
    def fail(self, n, columns):
        raise RuntimeError("operation not permitted\nwhen a stream is capturing")

    monkeypatch.setattr(decode_graphs.FixedSlots, "_capture", fail)
    model, prompts, graphs = tiny.model("llama"), queue(), DecodeGraphs()
    said(model, prompts, graphs=graphs, slots=3)
    graphs._kept._captures = True  # as on a device
    found, expected = pair(model, prompts, graphs, slots=3)
    assert_same(found, expected)
    assert_same(said(model, prompts, graphs=graphs, slots=3), expected)
    assert graphs._kept is None
    lines = [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert lines == ["LlamaForCausalLM decodes without CUDA graphs: RuntimeError: operation not permitted"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_steps_never_wait_for_the_device_and_a_capture_changes_nothing():
    model, prompts, graphs = tiny.model("llama").to("cuda"), queue().to(torch.device("cuda")), DecodeGraphs()
    expected = said(model, prompts)
    assert_same(said(model, prompts, graphs=graphs), expected)
    slots = graphs._kept
    assert slots._captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        for (n, columns), graph in slots._captured.items():
            graph.replay()
            slots._step(n, columns)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_forward_that_reads_a_value_decodes_eagerly(caplog):
    model, prompts, graphs = tiny.model("llama").to("cuda"), queue().to(torch.device("cuda")), DecodeGraphs()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: kwargs["input_ids"].sum().item() and None, with_kwargs=True
    )
    expected = said(model, prompts)
    assert_same(said(model, prompts, graphs=graphs), expected)
    assert_same(said(model, prompts, graphs=graphs), expected)
    assert len([record for record in caplog.records if "CUDA graphs" in record.message]) == 1


class NothingFromTheHost(TorchDispatchMode):
    """Refuses tensors of the CPU. On meta, which stands for a device here, reading a value is an error anyway."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [value for value in tree_leaves((args, kwargs, out)) if isinstance(value, torch.Tensor)]
        assert all(tensor.device.type == "meta" for tensor in found), func
        return out


def meta_slots(family, sampling):
    model, meta = tiny.model(family).to("meta"), torch.device("meta")
    outputs = Outputs(6, length=10, pad_id=tiny.PAD, stops=range(40), sampling=sampling, device=meta)
    slots = FixedSlots(model, WaitingPrompts([[1] * 5] * 6), outputs, limit=4, graphs=DecodeGraphs())
    config = model.config
    like = torch.empty(1, getattr(config, "num_key_value_heads", 4), 1, 8, device=meta)
    for layer in slots._cache.layers:
        layer.lazy_initialization(like, like)
    return slots


@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_neither_reads_a_value_nor_takes_one_from_the_host(family, kind):
    slots = meta_slots(family, SAMPLING[kind])
    with torch.no_grad(), NothingFromTheHost():
        slots._step(3, 32)


def test_a_step_that_reads_a_value_would_be_found(monkeypatch):
    slots = meta_slots("llama", SAMPLING["top-p"])
    draw = slots.outputs.draw
    monkeypatch.setattr(slots.outputs, "draw", lambda step, **_: draw(step))
    with torch.no_grad(), NothingFromTheHost(), pytest.raises(RuntimeError, match="meta"):
        slots._step(3, 32)


def test_clearing_frees_what_was_kept():
    graphs = DecodeGraphs()
    said(tiny.model("opt"), queue(), graphs=graphs)
    assert graphs._kept is not None
    graphs.clear()
    assert graphs._kept is None


class Device:
    """Stands for what `torch.cuda` does in a capture: the step in it does not run, and each replay runs it."""

    def __init__(self, monkeypatch):
        self.slots, self.mode, self.captures, self.replays = None, "default", [], 0
        for name in ("Stream", "Event", "stream", "current_stream", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: MagicMock())
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", mode))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        step, create = decode_graphs.FixedSlots._step, decode_graphs.FixedSlots.__init__

        def counted(slots, n, columns):
            self.slots, self.shape = slots, (n, columns)
            if not self.captures or self.captures[-1] is not True:
                step(slots, n, columns)

        def created(slots, *args, **kwargs):
            create(slots, *args, **kwargs)
            slots._captures = True
            slots._stream = slots._graphs.stream(slots._device)

        monkeypatch.setattr(decode_graphs.FixedSlots, "_step", counted)
        monkeypatch.setattr(decode_graphs.FixedSlots, "__init__", created)

    @contextmanager
    def capture(self, graph, *, pool, stream, capture_error_mode):
        self.captures.append(True)
        yield
        self.captures[-1] = graph.shape = self.shape


class Graph:
    def __init__(self, device):
        self._device = device

    def replay(self):
        self._device.replays += 1
        self._device.slots._step(*self.shape)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_shape_is_captured_once_and_warming_up_changes_nothing(family, monkeypatch):
    model, prompts, graphs = tiny.model(family), queue(), DecodeGraphs()
    stops = unequal_stops(model, prompts)
    expected = said(model, prompts, slots=4, stops=stops)
    device = Device(monkeypatch)
    for _ in range(2):
        assert_same(said(model, prompts, graphs=graphs, slots=4, stops=stops), expected)
    assert sorted(set(device.captures)) == sorted(device.captures) == sorted(graphs._kept._captured)
    assert len(device.captures) > 1
    assert device.replays > 10
    assert device.mode == "default"
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.clone()
    assert_same(said(model, prompts, graphs=graphs, slots=4, stops=stops), expected)
    assert len(device.captures) == 2 * len(set(device.captures))
