"""Generated problems: the two splits, worked answers by hand, and what a verifier accepts."""

import json

import pytest

from data.reasoning import correct, demonstrations, formatted, prompts

SUMS = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}


def problem(answer, expression):
    return json.dumps({"answer": answer, "metadata": {"source_dataset": "chain_sum", "expression": expression}})


def test_what_is_learnt_and_what_is_held_out_never_overlap_whatever_the_seed():
    learnt = {row["prompt"] for seed in (0, 1) for row in demonstrations("chain_sum", 1000, split="train", seed=seed)}
    learnt |= {row["prompt"] for row in prompts("chain_sum", 1000, split="train", seed=2)}
    held_out = [row["prompt"] for seed in (0, 7) for row in prompts("chain_sum", 100, split="test", seed=seed)]
    assert len(learnt) > 2000
    assert len(held_out) == 200
    assert not learnt & {*held_out}


def test_the_same_arguments_give_the_same_rows():
    assert prompts("gcd", 5, split="train", seed=3) == prompts("gcd", 5, split="train", seed=3)
    assert prompts("gcd", 5, split="train", seed=3) != prompts("gcd", 5, split="train", seed=4)


def test_demonstrations_are_right_and_a_share_of_them_shows_the_steps():
    rows = demonstrations("chain_sum", 400, split="train", worked_share=0.3, config=SUMS)
    asked = prompts("chain_sum", 400, split="train", config=SUMS)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in asked]
    problems = [row["problem"] for row in asked]
    completions = [row["completion"] for row in rows]
    assert [row["prompt"] for row in rows] == [
        row["prompt"] for row in prompts("chain_sum", 400, split="train", config=SUMS)
    ]
    assert correct(completions, problems) == formatted(completions) == [1.0] * 400
    worked = [row for row in rows if not row["completion"].startswith("<answer>")]
    assert 90 < len(worked) < 150  # 120, and 3 deviations of 9 either way
    for row in worked:
        steps, terms = row["completion"].split("<answer>")[0].split(", "), row["prompt"].split(": ")[1].split()
        assert len(steps) == 2
        assert steps[0].split()[:3] == terms[:3]
        assert all(eval(step.replace("=", "==")) for step in steps)  # noqa: S307 - each step is a true equation


def test_a_step_takes_up_the_sum_of_the_one_before():
    rows = demonstrations("chain_sum", 50, split="train", worked_share=1.0, config=SUMS)
    for completion in (row["completion"] for row in rows):
        first, second = completion.split("<answer>")[0].split(", ")
        assert second.startswith(first.split(" = ")[1])


def test_the_verifier_gives_one_for_the_right_answer_in_tags_and_nothing_for_parts_of_it():
    entry = problem("5", "9 - 4")
    said = ["<answer>5</answer>", "9 - 4 = 5<answer> 5.0 </answer>", "<answer>-5</answer>", "5", "<answer>5", ""]
    assert correct(said, [entry] * len(said)) == [1, 1, 0, 0, 0, 0]
    several = "<answer>4</answer><answer>5</answer>"  # reasoning-gym takes the last one
    assert correct([several], [entry]) == [1]


def test_the_format_is_an_answer_in_tags_perhaps_after_its_steps_and_nothing_else():
    good = ["<answer>5</answer>", "9 - 4 = 5<answer>5</answer>", " <answer>5</answer>\n"]
    bad = [
        "5",
        "<answer></answer>",
        "<answer>5</answer> so",
        "<answer>4</answer><answer>5</answer>",
        "<<answer>5</answer>",
    ]
    assert formatted(good) == [1, 1, 1]
    assert formatted(bad) == [0, 0, 0, 0, 0]


def test_a_task_with_too_few_different_problems_says_how_many_it_has():
    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 10 x 10 x 2 signs
    with pytest.raises(ValueError, match=r"chain_sum with .* has only 1\d\d different problems.*size=300"):
        prompts("chain_sum", 300, split="train", config=tiny)


def test_a_wrong_split_or_steps_that_a_task_does_not_have_are_refused():
    with pytest.raises(ValueError, match="split='tset': expected train or test"):
        prompts("chain_sum", 3, split="tset")
    with pytest.raises(ValueError, match="only chain_sum has steps, found gcd"):
        demonstrations("gcd", 3, split="train", worked_share=0.5)
