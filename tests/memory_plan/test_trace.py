"""Counting without memory: short models say what deep ones take, and the counts are those of real tensors."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from rlhf.algorithms.sft import sft_loss
from rlhf.config.roles import ModelKind
from rlhf.memory_plan.trace import Prepare, _traced, trace
from rlhf.models.shapes import Adapters, Shape
from rlhf.models.transforms import enable_activation_checkpointing

ROWS, LENGTH, VOCABULARY, LAYERS = 3, 40, 96, 7


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY}
    settings |= {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(settings | {"num_key_value_heads": 2}))
    return Shape(str(folder), ModelKind.causal_lm)


def learn(model):
    tokens = torch.ones(ROWS, LENGTH, dtype=torch.long)
    logits = model(input_ids=tokens, attention_mask=tokens, use_cache=False).logits
    return sft_loss(logits, tokens, tokens.bool(), denominator=1.0).loss


ADAPTED = Adapters(rank=4, targets=("all-linear",), top_layers=0)
TOP = Adapters(rank=4, targets=("all-linear",), top_layers=4)


@pytest.mark.parametrize("adapters", [None, ADAPTED, TOP], ids=["whole", "adapters", "top adapters"])
@pytest.mark.parametrize("recompute", [None, enable_activation_checkpointing], ids=["keeps", "recomputes"])
def test_short_models_say_exactly_what_a_deep_one_takes(shape, adapters, recompute):
    deep = replace(shape, adapters=adapters)
    prepare = Prepare(torch.float32, training=True, on_module=recompute)
    assert deep.is_regular
    expected = _traced(deep.with_runs(*deep.runs), learn, prepare=prepare)
    found = trace(deep, work=learn, prepare=prepare)
    assert [(s.where, s.total) for s in found] == [(s.where, s.total) for s in expected]


def test_a_recomputed_model_keeps_one_input_for_each_block(shape):
    kept, recomputed = (
        trace(shape, work=learn, prepare=Prepare(torch.float32, training=True, on_module=how))
        for how in (None, enable_activation_checkpointing)
    )
    last = [next(s for s in found if s.where == (0, False, "last")) for found in (kept, recomputed)]
    assert last[1].per_block == ROWS * LENGTH * 32 * 4
    assert last[0].per_block > 10 * last[1].per_block


class Squares(nn.Module):
    """Blocks that keep their input for backward, and nothing else."""

    def __init__(self, depth):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, device="meta"))
        self.blocks = nn.ModuleList(Square() for _ in range(depth))

    def forward(self, x):
        x = x * self.weight
        for block in self.blocks:
            x = block(x)
        return x


class Square(nn.Module):
    def forward(self, x):
        return x * x


class Plain:
    """As a spec, for the tracer."""

    def __init__(self, module):
        self.module, self.blocks = module, list(module.blocks)


def test_counts_can_be_worked_out_by_hand():
    """Input, its product with the weight, and three squares, the last of which nobody needs again: 1000 floats each."""

    def work(model):
        return model(torch.ones(1000)).sum()

    found = _traced(Plain(Squares(3)), work, prepare=Prepare(torch.float32, training=True))
    at = {(s.where.backward, s.where.place): s.total for s in found}
    assert at[False, "before"] == 2 * 4000
    assert at[False, "first"] == 3 * 4000
    assert at[False, "last"] == 5 * 4000
    assert at[True, "last"] >= 4 * 4000


def test_without_gradients_only_what_is_in_use_is_live():
    found = _traced(Plain(Squares(3)), lambda model: model(torch.ones(1000)), prepare=Prepare(torch.float32, False))
    assert max(s.total for s in found) == 3 * 4000  # the caller's input, a block's and its output


def test_an_offered_count_answers_code_that_reads_numbers():
    seen = []

    def work(model):
        seen.append((int(torch.ones(3, dtype=torch.long).sum()), bool(torch.ones(3, dtype=torch.bool).all())))
        return model(torch.ones(4)).sum()

    _traced(Plain(Squares(2)), work, prepare=Prepare(torch.float32, training=True, answer=5))
    assert seen == [(5, False)]
