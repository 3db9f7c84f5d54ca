"""DeepSpeed's schedules and batch sizes, against the values that DeepSpeed's own code gave."""

import json
from pathlib import Path

import pytest

from rlhf.deepspeed.arithmetic import SHAPES, Batch, deepspeed_schedule, solve_batch
from rlhf.deepspeed.reader import Document

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "deepspeed_schedules.json").read_text())["cases"]
BATCHES = json.loads((FOLDER / "deepspeed_batch.json").read_text())["cases"]
LR = 3e-4


def schedule_of(kind, options, *, lr=LR, warmup_steps=0, total_steps=999):
    return deepspeed_schedule(kind, lr=lr, warmup_steps=warmup_steps, total_steps=total_steps, options=options)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['kind']}-{len(case['options'])}-{len(case['lr'])}")
def test_every_step_has_deepspeeds_rate_and_betas(case):
    options = {"warmup_num_steps": 1000, **case["options"]} if "warmup" in case["kind"] else case["options"]
    schedule, steps = schedule_of(case["kind"], options), range(len(case["lr"]))
    assert [schedule.lr_at(step) for step in steps] == pytest.approx(case["lr"], rel=1e-12, abs=1e-18)
    found = [schedule.betas_at(step) for step in steps]
    if case["betas"]:
        expected = [value for pair in case["betas"] for value in pair]
        assert [value for pair in found for value in pair] == pytest.approx(expected)
    else:
        assert set(found) == {None}


def test_every_shape_is_covered():
    assert {case["kind"] for case in GOLDEN} == set(SHAPES)


def test_a_warm_up_loses_two_steps_as_deepspeeds_does():
    schedule = schedule_of("warmup_lr", {}, lr=1.0, total_steps=9, warmup_steps=4)
    found = [schedule.lr_at(step) for step in range(7)]
    assert found == pytest.approx([0, 0, 0.5, 0.7924812503605781, 1, 1, 1])  # log_4 of 1, 2, 3, 4


def test_what_the_options_leave_out_is_the_runs():
    explicit = {"warmup_num_steps": 5, "total_num_steps": 12, "warmup_max_lr": 1e-3}
    own = schedule_of("warmup_decay_lr", {"warmup_max_lr": 1e-3}, total_steps=12, warmup_steps=5)
    assert own == schedule_of("warmup_decay_lr", explicit, total_steps=99)


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("warmup_lr", {"warmup_steps": 3}, "found warmup_steps, expected some of lr, warmup_num_steps"),
        ("lr_range_test", {"lr_range_test_step_size": 0}, "found lr_range_test_step_size 0, expected 1 or more"),
        ("one_cycle", {"cycle_min_lr": 0, "cycle_max_lr": 1, "cycle_first_step_size": 0}, "cycle_first_step_size 0"),
        ("one_cycle", {"cycle_min_lr": 0}, "one_cycle: lacks cycle_max_lr"),
    ],
)
def test_options_that_make_no_sense_are_refused(kind, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        schedule_of(kind, options)


@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_batch_sizes_are_solved_as_deepspeed_solves_them(case):
    (train, micro, steps), ranks, expected = case
    given = {"train_batch_size": train, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps}
    document = Document("ds.json", {name: size for name, size in given.items() if size})
    own = Batch(48, 2)
    if train is None and micro is None:  # where DeepSpeed asserts, the run's own sizes answer
        assert solve_batch(document, own, ranks=ranks) == (Batch(2 * steps * ranks, 2) if steps else own)
    elif expected is None:
        with pytest.raises(ValueError, match=r"ds\.json: (train_|gradient_)"):
            solve_batch(document, own, ranks=ranks)
    else:
        assert solve_batch(document, own, ranks=ranks) == Batch(expected[0], expected[1])


@pytest.mark.parametrize(
    ("train", "micro", "steps", "expected"),
    [
        ("auto", "auto", "auto", (48, 4)),
        ("auto", "auto", None, (48, 4)),
        (None, "auto", "auto", (48, 4)),
        ("auto", 3, "auto", (48, 3)),
        (None, 3, "auto", (48, 3)),
        (32, "auto", "auto", (32, 4)),
        (12, "auto", "auto", (12, 3)),  # 4 does not divide its share of 6
        (12, None, None, (12, 6)),
        (12, "auto", 3, (12, 2)),
        ("auto", "auto", 3, (24, 4)),
        ("auto", 2, 3, (12, 2)),
        ("8", 2.0, "auto", (8, 2)),
    ],
)
def test_auto_is_the_runs_own_as_far_as_the_others_leave_it_free(train, micro, steps, expected):
    given = {"train_batch_size": train, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps}
    document = Document("ds.json", {name: size for name, size in given.items() if size is not None})
    assert solve_batch(document, Batch(48, 4), ranks=2) == Batch(*expected)


@pytest.mark.parametrize(
    ("sizes", "ranks", "sentence"),
    [
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}, 1,
         r"expected train_batch_size = .* found 32 and 4 x 1 x 1\. These numbers are for launch\.ranks=8\."),
        ({"train_batch_size": 4}, 8, "less than one sequence in each"),
        ({"train_batch_size": "MBSIZE,"}, 1, r"='MBSIZE,': expected .*goes to the end of its line"),
        ({"train_batch_size": "BATCH"}, 1, "Is it a placeholder"),
        ({"train_micro_batch_size_per_gpu": 1.5}, 1, "expected a whole number"),
        ({"train_batch_size": 0}, 1, "=0: expected 1 or more"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_add_up_are_refused_with_all_numbers(sizes, ranks, sentence):
    with pytest.raises(ValueError, match=sentence):
        solve_batch(Document("ds.json", sizes), Batch(48, 4), ranks=ranks)
