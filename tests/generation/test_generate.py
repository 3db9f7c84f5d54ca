"""Cached decoding against the plain model, token for token, on every family."""

import pytest
import torch

from rlhf.config.stage_configs import SamplingConfig
from rlhf.generation.generate import Decoding, generate
from rlhf.generation.sampling import uniforms
from rlhf.types import PromptBatch
from tests.models import tiny

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")  # transformers renames arguments now and then

GREEDY = SamplingConfig(temperature=0.0)
SAMPLED = SamplingConfig(temperature=0.8)
FAMILIES = list(tiny.FAMILIES)
LENGTHS = [4, 9, 6, 8]
NEW = 14  # with the prompts, more than twice the window of the sliding layers


def batch(lengths=LENGTHS, *, width=None, first_id=0):
    ids, mask = tiny.padded(lengths, side="left", width=width)
    sample_ids = torch.arange(first_id, first_id + len(lengths))
    texts, columns = ("",) * len(lengths), ({},) * len(lengths)
    return PromptBatch(ids, mask, sample_ids, prompts=texts, columns=columns)


def answer(model, prompts, *, stops=(), sampling=SAMPLED, new=NEW, seed=1, pad_id=tiny.PAD):
    return generate(model, prompts, decoding=Decoding(new, stops, pad_id, sampling), seed=seed)


def without_cache(model, prompts, *, sampling, seed, new=NEW):
    """Every token from a forward over the unpadded sequence so far, and its log-probability."""
    tokens = torch.zeros(len(prompts.prompts), new, dtype=torch.long)
    logprobs = torch.zeros(len(prompts.prompts), new)
    draws = uniforms(seed, prompts.sample_ids, length=new)
    for row, (ids, mask) in enumerate(zip(prompts.input_ids, prompts.attention_mask, strict=True)):
        sequence = ids[mask]
        for step in range(new):
            with torch.no_grad():
                logits = model(sequence[None]).logits[0, -1]
            probabilities = (logits / (sampling.temperature or 1)).softmax(-1)
            below = probabilities.double().cumsum(-1) <= draws[row, step]
            token = probabilities.argmax() if sampling.temperature == 0 else below.sum()
            tokens[row, step] = token
            logprobs[row, step] = probabilities[token].log()
            sequence = torch.cat([sequence, token[None]])
    return tokens, logprobs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_cached_and_padded_decoding_says_what_the_model_says_without_either(family, sampling):
    model = tiny.model(family)
    said = answer(model, batch(), sampling=sampling)
    tokens, logprobs = without_cache(model, batch(), sampling=sampling, seed=1)
    assert torch.equal(said.responses, tokens)
    assert torch.allclose(said.logprobs, logprobs, rtol=1e-4, atol=1e-4)
    assert said.response_mask.all()
    assert not said.ended.any()
    assert len(set(map(tuple, tokens.tolist()))) == len(LENGTHS)


def greedy_of_transformers(model, prompts, stops):
    """Responses `[B, R]` of `transformers.generate`."""
    sequences = model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask.long(),
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=stops,
        pad_token_id=tiny.PAD,
    )
    return sequences[:, prompts.input_ids.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_transformers(family):
    model = tiny.model(family)
    prompts = batch()
    free = answer(model, prompts, sampling=GREEDY)
    stops = [int(free.responses[0, 3]), int(free.responses[1, 6])]
    said = answer(model, prompts, sampling=GREEDY, stops=stops)
    expected = greedy_of_transformers(model, prompts, stops)
    assert torch.equal(said.responses, expected)
    assert said.ended[0]


def expected_end(row, stops):
    """Tokens up to the first stop and including it."""
    return next((index + 1 for index, token in enumerate(row) if token in stops), len(row))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_a_row_ends_at_any_stop_token_and_says_the_same_until_then(family):
    model, prompts = tiny.model(family), batch([4, 9, 6, 8, 5, 5, 7, 3])
    free = answer(model, prompts)
    stops = {int(free.responses[0, 2]), int(free.responses[3, 5]), int(free.responses[5, 9])}
    said = answer(model, prompts, stops=sorted(stops))
    ends = [expected_end(row, stops) for row in free.responses.tolist()]
    assert len(set(ends)) >= 3, "rows should leave at different times for this test to mean something"
    assert said.responses.shape[1] == max(ends)
    for row, end in enumerate(ends):
        assert said.responses[row, :end].tolist() == free.responses[row, :end].tolist()
        assert said.response_mask[row].tolist() == [True] * end + [False] * (max(ends) - end)
        assert torch.allclose(said.logprobs[row, :end], free.logprobs[row, :end], rtol=1e-4, atol=1e-4)
        assert (said.responses[row, end:] == tiny.PAD).all()
        assert (said.logprobs[row, end:] == 0).all()
        assert bool(said.ended[row]) == (free.responses[row, end - 1].item() in stops)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_row_says_does_not_depend_on_the_batch(family):
    model, prompts = tiny.model(family), batch()
    together = answer(model, prompts)
    stops = [int(together.responses[2, 4])]
    together = answer(model, prompts, stops=stops)
    for row in range(len(LENGTHS)):
        alone = answer(model, prompts.rows(torch.tensor([row])), stops=stops)
        length = int(together.response_mask[row].sum())
        assert alone.responses.shape == (1, length)
        assert alone.responses[0].tolist() == together.responses[row, :length].tolist()
        assert alone.ended[0] == together.ended[row]


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing(family):
    model = tiny.model(family)
    tight, loose = (answer(model, batch([7, 7], width=width)) for width in (7, 13))
    assert torch.equal(tight.responses, loose.responses)
    assert torch.allclose(tight.logprobs, loose.logprobs, rtol=1e-4, atol=1e-4)


def test_repeated_rows_differ_by_their_sample_alone():
    model = tiny.model("llama")
    prompts = batch([6]).rows(torch.tensor([0, 0, 0]))
    prompts = PromptBatch(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        sample_ids=torch.tensor([3, 4, 3]),
        prompts=prompts.prompts,
        columns=prompts.columns,
    )
    said = answer(model, prompts).responses
    assert torch.equal(said[0], said[2])
    assert not torch.equal(said[0], said[1])
    assert torch.equal(said, answer(model, prompts).responses)
    assert not torch.equal(said, answer(model, prompts, seed=2).responses)


def test_a_pad_token_that_is_the_eos_still_counts_where_it_was_said():
    model = tiny.model("llama")
    free = answer(model, batch())
    stop = int(free.responses[1, 3])
    said = answer(model, batch(), stops=[stop], pad_id=stop)
    for row, tokens in enumerate(free.responses.tolist()):
        end = expected_end(tokens, {stop})
        assert said.response_mask[row].sum() == end
        assert said.ended[row] == (stop in tokens)


def test_a_prompt_may_contain_a_stop_token():
    model, prompts = tiny.model("llama"), batch()
    stop = int(prompts.input_ids[0, -1])
    free = answer(model, prompts, sampling=GREEDY)
    said = answer(model, prompts, sampling=GREEDY, stops=[stop])
    assert said.response_mask[0].sum() == expected_end(free.responses[0].tolist(), {stop})


def test_one_new_token_is_enough():
    said = answer(tiny.model("gemma3"), batch(), new=1)
    assert said.responses.shape == (4, 1)


def test_sampled_log_probabilities_are_those_of_the_training_path():
    model, prompts = tiny.model("qwen3"), batch()
    said = answer(model, prompts, sampling=SamplingConfig(temperature=0.8, top_k=20, top_p=0.9))
    sequences = torch.cat([prompts.input_ids, said.responses], 1)
    mask = torch.cat([prompts.attention_mask, said.response_mask], 1)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=sequences, attention_mask=mask, position_ids=positions).logits
    before = logits[:, prompts.input_ids.shape[1] - 1 : -1] / 0.8
    expected = before.log_softmax(-1).gather(-1, said.responses[..., None]).squeeze(-1)
    assert torch.allclose(said.logprobs, expected, rtol=1e-4, atol=1e-4)


def test_cost_follows_the_rows_that_still_speak():
    model, prompts = tiny.model("llama"), batch([5] * 16)
    free = answer(model, prompts, new=10)
    stops = sorted(set(free.responses[:12, 1].tolist()))
    sizes = []
    hook = model.model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    said = answer(model, prompts, new=10, stops=stops)
    hook.remove()
    lengths = said.response_mask.sum(-1)
    speaking = [16] + [int((lengths > step).sum()) for step in range(1, int(lengths.max()))]
    assert sizes[0] == 16
    assert min(speaking) <= 4
    for size, needed in zip(sizes, speaking, strict=True):
        assert needed <= size <= max(needed * 8 / 7, needed + 1)


def test_training_mode_is_refused():
    with pytest.raises(AssertionError, match="eval mode"):
        answer(tiny.model("llama").train(), batch())


def test_ranks_that_need_each_other_go_on_until_all_are_done():
    model, forwards = tiny.model("llama"), []
    first = answer(model, batch()).responses[:, 0].unique().tolist()  # as stop tokens, they end every row at once
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    votes = iter([False, False, True])
    said = generate(
        model,
        batch(),
        decoding=Decoding(NEW, first, pad_id=tiny.PAD, sampling=SAMPLED),
        seed=1,
        all_done=lambda done: done and next(votes),
    )
    handle.remove()
    assert said.response_mask.sum(-1).tolist() == [1] * len(LENGTHS)
    assert len(forwards) == 3  # the prompts, and two more for the others' sake


def test_who_listens_hears_every_token_of_every_row_as_it_is_said():
    model, prompts = tiny.model("llama"), batch([4, 9, 6, 8, 5, 5, 7, 3])
    free = answer(model, prompts)
    stops = sorted({int(free.responses[0, 2]), int(free.responses[3, 5])})
    decoding = Decoding(NEW, stops, pad_id=tiny.PAD, sampling=SAMPLED)
    heard = {row: [] for row in range(8)}

    def on_tokens(rows, tokens):
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            heard[row].append(token)
        return True

    said = generate(model, prompts, decoding=decoding, seed=1, on_tokens=on_tokens)
    assert len({len(tokens) for tokens in heard.values()}) > 1, "rows should end at different times"
    for row, mask in enumerate(said.response_mask):
        assert heard[row] == said.responses[row][mask].tolist()


def test_a_listener_ends_the_answer_where_it_stands():
    model, forwards = tiny.model("llama"), []
    whole = answer(model, batch([6]))
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    decoding = Decoding(NEW, [], pad_id=tiny.PAD, sampling=SAMPLED)
    said = generate(model, batch([6]), decoding=decoding, seed=1, on_tokens=lambda rows, tokens: len(forwards) < 3)
    handle.remove()
    assert said.responses.tolist() == whole.responses[:, :3].tolist()
    assert not said.ended.any()
    assert len(forwards) == 3
