"""Padding; the same rows on any number of ranks; equal numbers of batches; resuming."""

from collections import Counter

import numpy as np
import pytest
import torch

from data.loader import (
    PromptLoader,
    TrainLoader,
    collate_demonstrations,
    collate_preferences,
    collate_prompts,
    evaluation_batches,
    evaluation_prompts,
    pad,
)
from data.samples import Demonstration, Preference, Prompt
from rlhf.config.bounds import MicroBatchLimit
from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import LoraConfig, OptimizerConfig, SFTConfig

WORDS = ["x" * (1 + index * 7 % 13) + f"-{index}" for index in range(23)]


def loader(*, ranks=1, rank=0, micro=8, tokens=None, steps=6, seed=3, samples=WORDS, size=8):
    return TrainLoader(
        samples,
        list,
        global_batch_size=size,
        limit=MicroBatchLimit(micro, tokens),
        rank=rank,
        ranks=ranks,
        seed=seed,
        steps=steps,
    )


def rows_of_steps(*, ranks, micro, **settings):
    """For each step, the rows that all ranks see together."""
    parts = [list(loader(ranks=ranks, rank=rank, micro=micro, **settings)) for rank in range(ranks)]
    return [sorted(row for part in parts for batch in part[step] for row in batch) for step in range(len(parts[0]))]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 4), (2, 4), (2, 1), (4, 2), (8, 1)])
@pytest.mark.parametrize("tokens", [None, 1, 20, 50])
def test_the_rows_of_a_step_do_not_depend_on_ranks_or_micro_batches(ranks, micro, tokens):
    assert rows_of_steps(ranks=ranks, micro=micro, tokens=tokens) == rows_of_steps(ranks=1, micro=8)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_with_a_limit_of_tokens_ranks_have_equally_many_micro_batches_and_steps_differ(ranks):
    counts = [[len(batches) for batches in loader(ranks=ranks, rank=rank, tokens=25)] for rank in range(ranks)]
    assert all(count == counts[0] for count in counts)
    assert ranks > 1 or len(set(counts[0])) > 1
    for rank in range(ranks):
        for batches in loader(ranks=ranks, rank=rank, tokens=25):
            assert all(0 < len(batch) * max(map(len, batch)) <= 25 for batch in batches)


def test_the_seed_changes_the_rows():
    assert rows_of_steps(ranks=1, micro=8, seed=3) != rows_of_steps(ranks=1, micro=8, seed=4)


def test_every_rank_gets_the_same_number_of_full_micro_batches():
    for rank in range(2):
        for batches in loader(ranks=2, rank=rank, micro=2):
            assert [len(batch) for batch in batches] == [2, 2]


def test_an_epoch_runs_on_into_the_next_which_is_shuffled_anew():
    rows = [row for step in loader(steps=23, size=2, micro=2) for batch in step for row in batch]
    assert Counter(rows) == Counter({word: 2 for word in WORDS})
    # step 11 takes the last row of the first epoch and the first of the second
    assert set(rows[:22]) | {rows[22], rows[23]} >= set(WORDS)
    first, second = rows[:22], rows[24:]
    assert first != second
    assert len(set(first)) == len(set(second)) == 22


def test_a_batch_may_be_larger_than_the_data():
    (batches,) = list(loader(samples=WORDS[:3], size=8, micro=8, steps=1))
    assert sorted(Counter(batches[0]).values()) == [2, 3, 3]


def test_micro_batches_hold_rows_of_similar_length_the_longest_first():
    for rank in range(2):
        (batches,) = list(loader(ranks=2, rank=rank, micro=2, steps=1))
        flat = [len(row) for batch in batches for row in batch]
        assert flat == sorted(flat, reverse=True)
    ((first_of_0, last_of_0),) = list(loader(ranks=2, rank=0, micro=2, steps=1))
    ((first_of_1, last_of_1),) = list(loader(ranks=2, rank=1, micro=2, steps=1))
    lengths = [len(row) for batch in (first_of_0, first_of_1, last_of_1, last_of_0) for row in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_a_loader_goes_on_where_its_state_was_taken():
    whole = list(loader())
    interrupted = loader()
    steps = iter(interrupted)
    done = [next(steps), next(steps)]
    resumed = loader()
    resumed.load_state_dict(interrupted.state_dict())
    assert interrupted.state_dict() == {"step": 2}
    assert done + list(resumed) == whole
    assert len(resumed) == 6


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match=r"global_batch_size by ranks x micro_batch_size \(3 x 2\): 8 is not a multiple"
    ):
        loader(ranks=3, micro=2)


@pytest.mark.parametrize(
    ("num_rows", "epochs", "max_steps", "steps"),
    [
        (100, 1, 0, 13),
        (96, 1, 0, 12),
        (96, 0.5, 0, 6),
        (100, 3, 0, 38),
        (3, 1, 0, 1),
        (100, 5, 7, 7),
        (24, 1 / 3, 0, 1),
        (24, 1e-8, 0, 1),
    ],
)
def test_steps_see_every_row_as_often_as_there_are_epochs(num_rows, epochs, max_steps, steps):
    optimizer, lora = OptimizerConfig(lr=1e-3), LoraConfig(rank=0)
    config = SFTConfig(
        seed=0,
        engine=EngineConfig(zero_stage=0),
        optimizer=optimizer,
        lora=lora,
        epochs=epochs,
        max_steps=max_steps,
        global_batch_size=8,
        micro_batch_size=8,
        max_prompt_tokens=1,
        max_response_tokens=1,
    )
    assert config.steps(num_rows) == steps


# ---- evaluation


@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 9, 23])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_row_is_evaluated_once_in_equally_many_batches(num_rows, ranks):
    limit = MicroBatchLimit(3)
    parts = [evaluation_batches(WORDS[:num_rows], list, limit=limit, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert all(0 <= batch.count <= len(batch.batch) <= 3 for part in parts for batch in part)
    counted = [row for part in parts for batch in part for row in batch.batch[: batch.count]]
    assert sorted(counted) == sorted(WORDS[:num_rows])


def test_a_rank_without_rows_gets_filler_that_does_not_count():
    first, second = (evaluation_batches(["a"], list, limit=MicroBatchLimit(4), rank=rank, ranks=2) for rank in range(2))
    assert [(b.batch, b.count) for b in first] == [(["a"], 1)]
    assert [(b.batch, b.count) for b in second] == [(["a"], 0)]


def test_no_rows_are_no_batches():
    assert evaluation_batches([], list, limit=MicroBatchLimit(4), rank=0, ranks=2) == []


# ---- prompts

PROMPTS = [Prompt(np.arange(1, 2 + index % 5, dtype=np.int32), f"prompt {index}") for index in range(7)]


@pytest.mark.parametrize(("count", "ranks"), [(5, 1), (5, 2), (6, 2), (2, 3)])
def test_every_held_out_prompt_is_asked_in_its_order_by_equally_many_on_every_rank(count, ranks):
    samples = [Prompt(np.arange(1, 2 + n, dtype=np.int32), f"text {n}") for n in range(count)]
    batches = [evaluation_prompts(samples, rank=rank, ranks=ranks, pad_id=0) for rank in range(ranks)]
    assert len({len(batch.prompts) for batch in batches}) == 1
    texts = [text for batch in batches for text in batch.prompts]
    ids = [number for batch in batches for number in batch.sample_ids.tolist()]
    assert texts[:count] == [f"text {n}" for n in range(count)]
    assert texts == [f"text {number}" for number in ids]  # one that is asked again is drawn alike
    given = [columns is not None for batch in batches for columns in batch.columns]
    assert given == [True] * count + [False] * (len(ids) - count)  # and no reward function is asked about it


def prompt_loader(*, ranks=1, rank=0, iterations=4, samples_per_prompt=2):
    return PromptLoader(
        PROMPTS,
        rollout_size=8,
        samples_per_prompt=samples_per_prompt,
        rank=rank,
        ranks=ranks,
        seed=5,
        iterations=iterations,
        pad_id=0,
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_prompts_and_sample_ids_do_not_depend_on_ranks(ranks):
    whole = list(prompt_loader())
    parts = [list(prompt_loader(ranks=ranks, rank=rank)) for rank in range(ranks)]
    for iteration, batch in enumerate(whole):
        assert batch.prompts == sum((part[iteration].prompts for part in parts), ())
        assert batch.sample_ids.tolist() == sum((part[iteration].sample_ids.tolist() for part in parts), [])


def test_sample_ids_are_unique_in_the_run():
    ids = [index for batch in prompt_loader() for index in batch.sample_ids.tolist()]
    assert ids == list(range(32))


def test_a_prompt_is_repeated_side_by_side_and_stays_on_one_rank():
    for rank in range(2):
        for batch in prompt_loader(ranks=2, rank=rank):
            assert batch.prompts[0::2] == batch.prompts[1::2]
            assert batch.input_ids[0::2].tolist() == batch.input_ids[1::2].tolist()


def test_all_prompts_are_seen_before_any_comes_again():
    seen = [prompt for batch in prompt_loader(iterations=7) for prompt in batch.prompts[::2]]
    assert [Counter(seen[start : start + 7]) for start in (0, 7, 14, 21)] == [Counter(p.text for p in PROMPTS)] * 4


def test_prompts_are_padded_on_the_left_and_their_tokens_kept():
    by_text = {prompt.text: prompt.input_ids.tolist() for prompt in PROMPTS}
    for batch in prompt_loader():
        for ids, mask, text in zip(batch.input_ids, batch.attention_mask, batch.prompts, strict=True):
            assert ids[mask].tolist() == by_text[text]
            assert mask.tolist() == sorted(mask.tolist())


def test_a_prompt_loader_goes_on_where_its_state_was_taken():
    whole = [batch.prompts for batch in prompt_loader()]
    interrupted = prompt_loader()
    next(iter(interrupted))
    resumed = prompt_loader()
    resumed.load_state_dict(interrupted.state_dict())
    assert [batch.prompts for batch in resumed] == whole[1:]
    assert len(resumed) == 4


def test_groups_that_would_straddle_ranks_are_refused():
    with pytest.raises(ValueError, match=r"ppo.rollout_size by ranks x samples_per_prompt \(4 x 4\): 8 is not"):
        prompt_loader(ranks=4, samples_per_prompt=4)


# ---- padding: sides, masks, and a pad token that is the EOS

PAD = 9


def ids(*values):
    return np.array(values, dtype=np.int32)


@pytest.fixture
def narrow(monkeypatch):
    """Batches as wide as their longest row."""
    monkeypatch.setattr("rlhf.types.WIDTHS", 1)


def test_demonstrations_are_padded_on_the_right(narrow):
    samples = [
        Demonstration(ids(1, 2, 3), np.array([False, True, True])),
        Demonstration(ids(4, 5), np.array([False, True])),
    ]
    batch = collate_demonstrations(samples, PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, PAD]]
    assert batch.attention_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.target_mask.tolist() == [[False, True, True], [False, True, False]]
    assert (batch.input_ids.dtype, batch.attention_mask.dtype) == (torch.int64, torch.bool)


def test_a_pad_token_that_is_the_eos_hides_no_token(narrow):
    eos = PAD
    batch = collate_demonstrations(
        [
            Demonstration(ids(eos, 5, eos), np.array([False, True, True])),
            Demonstration(ids(1, 2, 3, eos), np.array([False, True, True, True])),
        ],
        eos,
    )
    assert batch.attention_mask.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.target_mask.tolist() == [[False, True, True, False], [False, True, True, True]]


def test_preferences_are_all_chosen_then_all_rejected(narrow):
    first = (np.array([False, True]), np.array([False, False, True]))
    pairs = [
        Preference(ids(1, 2), ids(1, 3, 4), margin=0.5, targets=first, reference=np.float32([-1, -2])),
        Preference(ids(5), ids(6), margin=0.0, targets=(np.array([True]),) * 2),
    ]
    batch = collate_preferences(pairs, PAD)
    assert batch.target_mask.tolist() == [[False, True, False], [True, False, False]] + [
        [False, False, True],
        [True, False, False],
    ]
    assert batch.reference_logprobs.tolist() == [-1, 0, -2, 0]
    assert batch.input_ids.tolist() == [[1, 2, PAD], [5, PAD, PAD], [1, 3, 4], [6, PAD, PAD]]
    assert batch.attention_mask.sum(-1).tolist() == [2, 1, 3, 1]
    assert batch.margin.tolist() == [0.5, 0.0]
    assert batch.margin.dtype == torch.float32


def test_prompts_are_padded_on_the_left(narrow):
    batch = collate_prompts([Prompt(ids(1, 2, 3), "abc", {"answer": [1]}), Prompt(ids(4), "d")], [70, 71], pad_id=PAD)
    assert batch.columns == ({"answer": [1]}, {})
    assert batch.rows(torch.tensor([1, 0, 0])).columns == ({}, {"answer": [1]}, {"answer": [1]})
    assert batch.input_ids.tolist() == [[1, 2, 3], [PAD, PAD, 4]]
    assert batch.attention_mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.sample_ids.tolist() == [70, 71]
    assert batch.prompts == ("abc", "d")


def test_rows_of_equal_length_are_not_padded(narrow):
    batch = collate_prompts([Prompt(ids(1, 2), "a"), Prompt(ids(3, 4), "b")], [0, 1], pad_id=PAD)
    assert batch.attention_mask.all()
    assert batch.input_ids.shape == (2, 2)


@pytest.mark.parametrize(("longest", "width"), [(1, 8), (8, 8), (9, 16)])
def test_widths_are_multiples_of_8_on_the_side_of_the_padding(longest, width):
    rows = [np.arange(1, longest + 1, dtype=np.int32), ids(7)]
    right, left = pad(rows, PAD), pad(rows, PAD, left=True)
    assert right.values.shape == left.values.shape == right.mask.shape == left.mask.shape == (2, width)
    for row, expected in enumerate(rows):
        count = len(expected)
        assert right.values[row].tolist() == [*expected, *[PAD] * (width - count)]
        assert left.values[row].tolist() == [*[PAD] * (width - count), *expected]
        assert right.mask[row].tolist() == [True] * count + [False] * (width - count) == left.mask[row].tolist()[::-1]
