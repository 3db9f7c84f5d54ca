"""More prompts than slots: the answers are those of every prompt alone, and no forward is wasted."""

import logging

import pytest
import torch

from rlhf.generation.generate import Decoding, generate
from rlhf.types import PromptBatch
from tests.generation.test_generate import FAMILIES, GREEDY, NEW, SAMPLED, batch, greedy_of_transformers
from tests.models import tiny

LENGTHS = [4, 9, 6, 2, 8, 5, 5, 9, 3, 7, 4]


def queue(lengths=LENGTHS, *, copies=1):
    """Prompts of these lengths, each several times, as samples of their own."""
    once = batch(lengths)
    rows = once.rows(torch.arange(len(lengths)).repeat_interleave(copies))
    ids = torch.arange(len(rows.sample_ids))
    return PromptBatch(rows.input_ids, rows.attention_mask, ids, prompts=rows.prompts, columns=rows.columns)


def said(model, prompts, *, slots, stops=(), sampling=SAMPLED, new=NEW, **more):
    decoding = Decoding(new, stops, pad_id=tiny.PAD, sampling=sampling, slots=slots)
    return generate(model, prompts, decoding=decoding, seed=1, **more)


def unequal_stops(model, prompts, sampling=SAMPLED):
    """Tokens that end some responses at once, some later and some never."""
    free = said(model, prompts, slots=None, sampling=sampling).responses
    return sorted({int(free[0, 0]), int(free[1, 2]), int(free[4, 5])})


def assert_each_is_alone(model, prompts, found, **settings):
    for row in range(len(prompts.prompts)):
        alone = said(model, prompts.rows(torch.tensor([row])), slots=None, **settings)
        length = int(found.response_mask[row].sum())
        assert alone.responses[0].tolist() == found.responses[row, :length].tolist()
        assert torch.allclose(alone.logprobs[0], found.logprobs[row, :length], rtol=1e-4, atol=1e-4)
        assert alone.ended[0] == found.ended[row]
        assert found.responses[row, length:].eq(tiny.PAD).all()
        assert found.logprobs[row, length:].eq(0).all()


class Forwards:
    """Counts the rows and columns that a model reads."""

    def __init__(self, model):
        self.shapes = []
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _, __, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def stop(self):
        self._hook.remove()
        return self.shapes


@pytest.mark.parametrize("family", [*FAMILIES, "states"])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_queue_is_answered_as_every_prompt_alone(family, slots):
    model, prompts = tiny.model(family), queue()
    stops = unequal_stops(model, prompts)
    found = said(model, prompts, slots=slots, stops=stops)
    lengths = found.response_mask.sum(-1)
    assert lengths.min() == 1
    assert lengths.max() == NEW
    assert_each_is_alone(model, prompts, found, stops=stops)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_queue_equals_transformers(family):
    model, prompts = tiny.model(family), queue()
    stops = unequal_stops(model, prompts, GREEDY)
    expected = greedy_of_transformers(model, prompts, stops)
    assert torch.equal(said(model, prompts, slots=4, sampling=GREEDY, stops=stops).responses, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "states"])
@pytest.mark.parametrize("slots", [2, 5, None])
def test_equal_prompts_are_read_once_and_answered_apart(family, slots):
    model, prompts = tiny.model(family), queue([4, 9, 6], copies=4)
    stops, forwards = unequal_stops(model, prompts), Forwards(model)
    found = said(model, prompts, slots=slots, stops=stops)
    read = [rows for rows, columns in forwards.stop() if columns > 1]
    assert_each_is_alone(model, prompts, found, stops=stops)
    assert len(set(map(tuple, found.responses.tolist()))) > 6
    if slots is None:
        assert read == [3]


def test_the_cost_follows_the_tokens_that_are_needed():
    model, prompts = tiny.model("llama"), queue([5, 6, 7] * 16)
    free = said(model, prompts, slots=None).responses
    stops, forwards = sorted(set(free[:8, 3].tolist())), Forwards(model)
    found = said(model, prompts, slots=8, stops=stops)
    decoded = [rows for rows, columns in forwards.stop() if columns == 1]
    lengths = found.response_mask.sum(-1)
    needed = int((lengths - 1).sum())
    one_after_another = sum(8 * (int(group.max()) - 1) for group in lengths.split(8))
    assert max(decoded) == 8
    assert needed <= sum(decoded) < 0.75 * one_after_another
    assert sum(decoded) < 1.3 * needed


def test_no_slot_is_empty_while_a_prompt_waits():
    model, prompts = tiny.model("gpt2"), queue([3, 4, 5, 6] * 5)
    free = said(model, prompts, slots=None)
    stops, spoke, ends = [int(free.responses[2, 3])], [], []

    def on_tokens(rows, tokens):
        spoke.append(set(rows.tolist()))
        ends.extend(row for row, token in zip(rows.tolist(), tokens.tolist(), strict=True) if token in stops)
        return True

    found = said(model, prompts, slots=4, stops=stops, on_tokens=on_tokens)
    assert set.union(*spoke) == set(range(20))
    assert sorted(ends) == found.ended.nonzero().flatten().tolist()
    assert sum(map(len, spoke)) == int(found.response_mask.sum())


@pytest.mark.parametrize("slots", [1, 4, None])
def test_all_rows_may_end_at_once(slots):
    model, prompts = tiny.model("mistral"), queue()
    first = said(model, prompts, slots=None).responses[:, 0].unique().tolist()
    found = said(model, prompts, slots=slots, stops=first)
    assert found.responses.shape == (len(LENGTHS), 1)
    assert found.ended.all()


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
def test_responses_much_longer_than_the_spare_columns(family):
    model, prompts = tiny.model(family), queue([40, 3, 17, 2, 9])
    stops = [int(said(model, prompts, slots=None, new=80).responses[1, 30])]
    found = said(model, prompts, slots=2, new=80, stops=stops)
    assert len(found.response_mask.sum(-1).unique()) > 1
    assert_each_is_alone(model, prompts, found, stops=stops, new=80)


def test_a_row_that_diverges_leaves_the_next_one_in_its_slot_alone():
    model, prompts = tiny.model("llama"), queue([6, 5, 4])
    bad = int(prompts.input_ids[0, -6])  # in the longest prompt, which is read first
    assert not prompts.input_ids[1:].eq(bad).any()
    before = said(model, prompts, slots=1, new=4)
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = torch.nan
    after = said(model, prompts, slots=1, new=4)
    assert after.logprobs[0].isnan().all()
    assert torch.equal(after.responses[1:], before.responses[1:])
    assert torch.allclose(after.logprobs[1:], before.logprobs[1:])


def test_ranks_with_different_queues_make_equally_many_forwards():
    model, counts = tiny.model("llama"), []
    turns = {}
    for lengths in (LENGTHS, [5] * 11):  # alone first: how many forwards each needs
        forwards = Forwards(model)
        said(model, queue(lengths), slots=3, stops=unequal_stops(model, queue()))
        turns[len(lengths), lengths[0]] = forwards.stop()
    longest = max(map(len, turns.values()))
    for lengths in (LENGTHS, [5] * 11):
        forwards, votes = Forwards(model), iter(range(1, 1000))
        said(
            model,
            queue(lengths),
            slots=3,
            stops=[],
            all_done=lambda done, votes=votes: next(votes) >= longest + 100 and done,
        )
        counts.append(len(forwards.stop()))
    assert counts == [longest + 100] * 2


def test_a_model_with_states_says_why_it_answers_batch_after_batch(caplog):
    with caplog.at_level(logging.INFO):
        said(tiny.model("states"), queue(), slots=3)
    assert [record.message for record in caplog.records if "one batch after another" in record.message] == [
        "Lfm2ForCausalLM keeps DynamicLayer, LinearAttentionLayer: it answers one batch after another"
    ]
