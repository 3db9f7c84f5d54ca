"""Counting without memory: short models say what deep ones take, and the counts are those of real tensors."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from rlhf.algorithms.logprobs import Wanted
from rlhf.algorithms.supervised_losses import sft_loss
from rlhf.config.stage_configs import LoraConfig, ModelKind, SamplingConfig
from rlhf.generation.generate import Decoding, answer
from rlhf.memory_plan import trace as trace_module
from rlhf.memory_plan.trace import Mode, ModelShape, trace, trace_once
from rlhf.models.causal_lm import token_statistics

ROWS, LENGTH, VOCABULARY, LAYERS = 3, 40, 96, 7


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    return ModelShape(str(folder), ModelKind.causal_lm)


def learn(model):
    tokens = torch.ones(ROWS, LENGTH, dtype=torch.long)
    found = token_statistics(model, tokens, attention_mask=tokens, mask=tokens[:, 1:].bool(), wanted=Wanted())
    return sft_loss(found, tokens.bool(), denominator=1.0).loss


def score(model):
    learn(model)


def decode(model):
    prompts = [[row] * LENGTH for row in range(ROWS)]
    decoding = Decoding(max_new_tokens=8, stop_token_ids=[0], pad_id=0, sampling=SamplingConfig())
    answer(model, prompts, sample_ids=torch.arange(ROWS), decoding=decoding, seed=0)


ADAPTED = LoraConfig(rank=4)
TOP = LoraConfig(rank=4, top_layers=4)
MODES = {
    "keeps": (learn, Mode(torch.float32, training=True)),
    "recomputes": (learn, Mode(torch.float32, training=True, recomputes=True)),
    "no gradients": (score, Mode(torch.float32)),
    "decodes": (decode, Mode(torch.float32, decoding_rows=ROWS)),
}
SETTINGS = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY}
SETTINGS |= {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
SETTINGS |= {"num_key_value_heads": 2}


@pytest.mark.parametrize("lora", [None, ADAPTED, TOP], ids=["whole", "adapters", "top adapters"])
@pytest.mark.parametrize(("work", "mode"), MODES.values(), ids=MODES)
def test_short_models_say_exactly_what_a_deep_one_takes(shape, lora, work, mode):
    deep = replace(shape, lora=lora)
    assert deep.is_regular
    expected = trace_once(deep.build(deep.runs), work, mode=mode)
    found = trace(deep, work=work, mode=mode)
    assert [(s.point, s.total) for s in found] == [(s.point, s.total) for s in expected]


def test_a_model_that_returns_all_hidden_states_keeps_them_without_gradients_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"output_hidden_states": True}))
    deep = ModelShape(str(tmp_path), ModelKind.causal_lm)
    found = trace(deep, work=score, mode=Mode(torch.float32))
    expected = trace_once(deep.build(deep.runs), score, mode=Mode(torch.float32))
    assert [(s.point, s.total) for s in found] == [(s.point, s.total) for s in expected]
    assert found[-1].per_block == ROWS * LENGTH * 32 * 4


def test_a_recomputed_model_keeps_one_input_for_each_block(shape):
    kept, recomputed = (
        trace(shape, work=learn, mode=Mode(torch.float32, training=True, recomputes=recomputes))
        for recomputes in (False, True)
    )
    last = [next(s for s in found if s.point == (0, False, "last")) for found in (kept, recomputed)]
    assert last[1].per_block == ROWS * LENGTH * 32 * 4
    assert last[0].per_block > 10 * last[1].per_block


def test_what_has_been_traced_is_not_traced_again(shape, monkeypatch):
    calls = []
    monkeypatch.setattr(trace_module, "trace_once", lambda *args, **kwargs: calls.append(args) or [])
    equal = [replace(shape, num_layers=LAYERS, lora=LoraConfig(rank=3)) for _ in range(2)]
    assert trace(equal[0], work=score, mode=Mode(torch.float32)) is trace(
        equal[1], work=score, mode=Mode(torch.float32)
    )
    assert len(calls) == 1, "without gradients and cache, one short model stands for all"


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

    found = trace_once(Plain(Squares(3)), work, mode=Mode(torch.float32, training=True))
    at = {(s.point.backward, s.point.place): s.total for s in found}
    assert at[False, "before"] == 2 * 4000
    assert at[False, "first"] == 3 * 4000
    assert at[False, "last"] == 5 * 4000
    assert at[True, "last"] >= 4 * 4000


def test_without_gradients_only_what_is_in_use_is_live():
    found = trace_once(Plain(Squares(3)), lambda model: model(torch.ones(1000)), mode=Mode(torch.float32))
    assert max(s.total for s in found) == 3 * 4000  # the caller's input, a block's and its output


def test_an_offered_count_answers_code_that_reads_numbers():
    seen = []

    def work(model):
        seen.append((int(torch.ones(3, dtype=torch.long).sum()), bool(torch.ones(3, dtype=torch.bool).all())))
        return model(torch.ones(4)).sum()

    trace_once(Plain(Squares(2)), work, mode=Mode(torch.float32, training=True, decoding_rows=5))
    assert seen == [(5, False)]
