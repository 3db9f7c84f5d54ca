"""Generators of the user's own: what they are given, and what becomes of what they return."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.config.stage_configs import LoraConfig, SamplingConfig
from rlhf.generation.backend import Backend, find_backend
from rlhf.generation.generate import Decoding
from rlhf.models.causal_lm import causal_lm
from rlhf.models.export import plain_tensors
from rlhf.runtime import dist
from rlhf.runtime.errors import RunError
from tests.generation.test_generate import batch
from tests.models import tiny
from tests.ranks import run_on_ranks

EXAMPLE = "examples/transformers_backend.py:Copy"
STOP = tiny.EOS
DECODING = Decoding(4, [STOP], pad_id=tiny.PAD, sampling=SamplingConfig(temperature=0.7))
GOOD = [([1, 2, STOP], [-0.5, -1, 0], True), (torch.tensor([3, 4, 5, 6]), torch.full((4,), -2.0), False)]


def backend(**parts):
    return Backend("mine.py:Mine", SimpleNamespace(**parts))


def answer(found, count=2):
    def generate(**given):
        given_last.update(given)
        return found

    given_last = {}
    said = backend(generate=generate).answer(batch([2, 3][:count]), decoding=DECODING, seed=3, vocabulary=tiny.VOCAB)
    return said, given_last


def test_answers_become_padded_rows():
    said, given = answer(iter(GOOD))
    assert said.responses.tolist() == [[1, 2, STOP, tiny.PAD], [3, 4, 5, 6]]
    assert said.response_mask.sum(-1).tolist() == [3, 4]
    assert said.logprobs.tolist() == [[-0.5, -1, 0, 0], [-2] * 4]
    assert said.ended.tolist() == [True, False]
    assert list(map(len, given["prompts"])) == [2, 3]
    assert len(set(given["seeds"])) == 2
    assert all(0 <= seed < 2**63 for seed in given["seeds"])
    assert (given["max_new_tokens"], given["temperature"], given["stop_token_ids"]) == (4, 0.7, [STOP])


def test_a_seed_belongs_to_its_prompt():
    seeds = answer(GOOD)[1]["seeds"]
    assert answer(GOOD[:1], count=1)[1]["seeds"] == seeds[:1]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (([1, 2], [-1.0], False), "has 2 tokens and log-probabilities [-1.0]; expected one for each"),
        (([1, 2], [-1.0, math.nan], False), "has log-probabilities [-1.0, nan]; expected finite ones, at most 0"),
        (([1, 2], [-1.0, -math.inf], False), "expected finite ones, at most 0"),
        (([1, 2], [-1.0, 0.5], False), "expected finite ones, at most 0"),
        (([1, 128], [-1.0, -1], False), "has tokens [1, 128]; expected numbers below 128"),
        (([1, -1], [-1.0, -1], False), "expected numbers below 128"),
        (([], [], False), "has tokens []; expected 1 to 4 whole numbers"),
        (([1] * 5, [-1.0] * 5, False), "expected 1 to 4 whole numbers"),
        (([1.5], [-1.0], False), "expected 1 to 4 whole numbers"),
        ((torch.ones(1, 2).long(), [-1.0], False), "expected 1 to 4 whole numbers"),
        (([1, STOP], [-1.0, -1], False), "and ended=False; expected a stop token (of [121]) at its end if it ended"),
        (([1, 2], [-1.0, -1], True), "and ended=True; expected a stop token"),
        (([STOP, 2], [-1.0, -1], False), "and none elsewhere"),
        (([1, 2], [-1.0, -1]), "expected tokens, log-probabilities and whether it ended"),
        ((["a"], [-1.0], False), "expected tokens, log-probabilities and whether it ended"),
        (None, "has None; expected tokens"),
    ],
)
def test_a_wrong_answer_ends_the_run_in_one_sentence(row, sentence):
    with pytest.raises(RunError) as caught:
        answer([GOOD[0], row])
    text = str(caught.value)
    assert text.startswith("ppo.generation_backend=mine.py:Mine: answer 1 of generate has ")
    assert sentence in text
    assert len(text) < 500


def test_answers_may_neither_lack_nor_fail():
    with pytest.raises(RunError, match="generate gave 1 answers; expected one for each of 2"):
        answer(GOOD[:1])
    with pytest.raises(RunError, match=r"generate failed: ZeroDivisionError: division by zero \(test_backend.py, line"):
        answer(1 / 0 for _ in range(2))


def test_a_class_that_is_no_generator_is_refused(tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text(
        "class Half:\n    def __init__(self, model, rank, ranks): ...\n    def generate(self): ...\n\n"
        "class Bad(Half):\n    def __init__(self, **words): raise KeyError('port')\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"half.py:Half: found a Half without load_weights; expected made with model"):
        Backend.open("half.py:Half", model="x", rank=0, ranks=1)
    with pytest.raises(RunError, match=r"half.py:Bad: its constructor failed: KeyError: 'port'"):
        Backend.open("half.py:Bad", model="x", rank=0, ranks=1)
    with pytest.raises(ValueError, match=r"ppo.generation_backend=half.py:None: no such function"):
        find_backend("half.py:None")


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "opt"])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_example_answers_with_the_weights_that_it_was_given(tmp_path, family, rank):
    """Its log-probabilities are those of plain transformers on the merged model."""
    folder, other = tiny.save(family, tmp_path / "model"), tiny.save(family, tmp_path / "other", seed=5)
    module = tiny.materialized(causal_lm(other, lora=LoraConfig(rank=rank)))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    backend, prompts = Backend.open(EXAMPLE, model=str(folder), rank=0, ranks=1), batch([4, 7])
    backend.load(plain_tensors(module, tiny.named_tensors(module)))
    said = backend.answer(prompts, decoding=DECODING, seed=1, vocabulary=tiny.VOCAB)
    for row, prompt in enumerate(prompts.token_ids()):
        response = said.responses[row][said.response_mask[row]]
        with torch.no_grad():
            logits = module(torch.tensor([prompt + response.tolist()])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(said.logprobs[row, : len(response)], expected, rtol=1e-4, atol=1e-4)
    again = backend.answer(prompts.rows(torch.tensor([1])), decoding=DECODING, seed=1, vocabulary=tiny.VOCAB)
    length = int(said.response_mask[1].sum())
    assert torch.equal(again.responses[0, :length], said.responses[1, :length])
    if not rank:
        plain = AutoModelForCausalLM.from_pretrained(other)
        assert all(
            torch.equal(a, b) for a, b in zip(plain.parameters(), backend.generator.model.parameters(), strict=True)
        )


def one_rank_fails():
    world, found, taken = dist.start("cpu"), [], []

    def tensors():
        for number in range(5):
            total = dist.sum_over_ranks(torch.ones(1))  # stands for a gather
            taken.append(number)
            yield f"w{number}", total

    def load_weights(tensors):
        next(tensors)
        if world.rank == 1:
            raise ConnectionError("refused")

    try:
        backend(load_weights=load_weights).load(tensors())
    except RunError as error:
        found.append(str(error))
    dist.stop()
    return found, taken


def test_a_rank_that_fails_gathers_every_tensor_and_ends_all_ranks():
    for found, taken in run_on_ranks(one_rank_fails, 2):
        assert taken == list(range(5))
        assert len(found) == 1
        assert found[0].startswith("ppo.generation_backend=mine.py:Mine: load_weights failed: ConnectionError: refused")
