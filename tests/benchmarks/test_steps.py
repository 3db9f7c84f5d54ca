"""Contenders that take turns, and that they do the same work: rows, losses and the table."""

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import steps, steps_run
from benchmarks.rounds import Contender, alternate

pytestmark = pytest.mark.usefixtures("forked_contenders")

ECHO = """
import sys
from benchmarks.rounds import Steps, Turns

steps = Steps(Turns(), 2)
for number in range(100):
    print("what a package prints")
    steps.done({value} + number)
"""


def start(folder, name, code):
    return lambda: Contender([sys.executable, "-c", code], log=folder / f"{name}.log")


def test_contenders_take_turns_and_keep_their_state(tmp_path):
    """A turn is two steps, and the first one warms up."""
    starts = {name: start(tmp_path, name, ECHO.format(value=value)) for name, value in (("a", 0), ("b", 1000))}
    found = alternate(starts, rounds=2)
    assert [turn["losses"] for turn in found["a"]] == [[2, 3], [4, 5]]
    assert [turn["losses"] for turn in found["b"]] == [[1002, 1003], [1004, 1005]]
    assert all(turn["cpu_seconds"] >= 0 for turns in found.values() for turn in turns)
    assert "what a package prints" in (tmp_path / "a.log").read_text()


def test_a_contender_that_fails_is_named_with_the_end_of_its_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)trl ended with 1:.*no module of that name"):
        alternate({"trl": start(tmp_path, "trl", "raise ImportError('no module of that name')")}, rounds=1)


def test_each_batch_has_sequences_from_half_the_length_to_all_of_it():
    found = steps_run.rows({"rows": 4, "length": 64})
    assert len(found) == 4 * steps_run.BATCHES
    for number in range(steps_run.BATCHES):
        own = found[4 * number : 4 * number + 4]
        for side in ("chosen_ids", "rejected_ids"):
            assert sorted(len(row["prompt_ids"]) + len(row[side]) for row in own) == [40, 48, 56, 64]


def test_the_plain_losses_are_those_of_transformers_and_of_a_sum_by_hand():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32))
    row = {"prompt_ids": [3, 4], "chosen_ids": [5, 6, 7], "rejected_ids": [8]}
    ids, mask, answers = steps_run._padded([row], sides=1, pad_id=0)
    expected = model(input_ids=ids, labels=ids.masked_fill(~answers, -100)).loss
    torch.testing.assert_close(steps_run._language_loss(model, ids, mask, answers), expected)
    sums = steps_run._sums(model, *steps_run._padded([row], sides=2, pad_id=0))
    short = model(input_ids=torch.tensor([[3, 4, 8]])).logits.log_softmax(-1)
    torch.testing.assert_close(sums, torch.stack([-3 * expected, short[0, 1, 8]]))


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_ours_and_pytorch_alone_train_alike(stage):
    """In fp32: `measure` fails where their losses differ."""
    row = steps.measure(stage, size="1M", precision="fp32", rounds=1, length=16, peer=None)
    assert row[0] == stage
    assert row[3] == "–"
    assert float(row[6]) < 1e-5


def test_another_training_is_no_result():
    found = {name: [{"cpu_seconds": 1.0, "losses": [loss]}] for name, loss in (("plain", 2.0), ("ours", 2.1))}
    with pytest.raises(AssertionError, match="sft: not the same training"):
        steps._row("sft", found, precision="fp32")
    assert steps._row("sft", found | {"ours": found["plain"]}, precision="fp32")[4] == "1.00"
