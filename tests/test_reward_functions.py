"""Reward functions are called as TRL calls them, and whatever goes wrong names the source, the row and what to do."""

import math

import pytest
import torch

from rlhf.config.reward_config import RewardErrors, RewardSettings
from rlhf.reward_calls import RewardFunctions, missing_columns
from rlhf.reward_functions import RewardRows
from rlhf.runtime.errors import RunError
from tests import reward_examples
from tests.ranks import run_on_ranks

NAN, INF = math.nan, math.inf
COLUMNS = [
    {"prompt": "2 + 2", "ground_truth": "4", "task": "math"},
    {"prompt": "capital of France", "ground_truth": "Paris", "task": "trivia", "bonus": 7},
    {"prompt": "3 + 4", "ground_truth": "7", "task": "math"},
]
TEXTS = ("\\boxed{4}", "Rome", "it is 7, not 4")


def load(*names, **settings):
    sources = [f"tests.reward_examples:{name}" if ":" not in name else name for name in names]
    return RewardFunctions.load(RewardSettings(rewards=sources, **settings), stage="ppo")


def rows(columns=COLUMNS, texts=TEXTS, **state):
    return RewardRows.of(columns, texts=texts, token_ids=[[1] * len(text) for text in texts], **state)


def scored(*names, given=None, **settings):
    return load(*names, **settings).score(given or rows()).T.tolist()


def test_functions_written_for_trl_work_unchanged():
    found = scored("length", "tokens", "accuracy", "asked_elsewhere", "array")
    assert found == [[9, 4, 14], [9, 4, 14], [1, 0, 0], [1, 0, 1], [0, 1, 2]]


def test_a_function_that_does_not_apply_says_none():
    (found,) = scored("math_only")
    assert found[::2] == [1, 1]
    assert math.isnan(found[1])


def test_conversations_are_given_as_messages():
    columns = [{"prompt": [{"role": "user", "content": "think"}]}] * 2
    given = rows(columns, ("<think>a\nb</think>c", "c"))
    assert given.arguments()["prompts"][0] == columns[0]["prompt"]
    assert given.arguments()["completions"][1] == [{"role": "assistant", "content": "c"}]
    assert scored("format_of_reasoning", "length", given=given) == [[1, 0], [19, 1]]


def test_a_function_gets_what_its_signature_takes_and_a_column_that_a_row_lacks_is_none():
    assert scored("optional") == [[0, 7, 0]]
    assert scored("optional", given=rows([{"prompt": "p"}] * 3)) == [[0, 0, 0]]
    assert load("optional").columns == {"prompt", "bonus"}
    assert load("optional", "length").columns is None  # **kwargs reads all
    assert load().columns == set()


@pytest.mark.parametrize("name", ["scorer", "part", "wrapped", "part_of_async", "wrapper_of_async", "part_of_object"])
def test_whatever_can_be_called_is_a_function(name):
    assert scored(name) == [[1, 1, 1]]


@pytest.mark.parametrize("name", ["of_numpy", "numpy_scalars", "torch_scalars", "booleans", "yielded", "column"])
def test_numbers_of_every_kind_are_scores(name):
    assert scored(name) == [[1, 0, 1]]


def test_a_function_may_change_what_it_is_given(caplog):
    conversation = [{"role": "user", "content": "hello"}]
    columns = [{"prompt": conversation, "steps": ["a", {"b": [1]}]} for _ in range(2)]
    given = rows(columns, ("x", ""))
    for _ in range(2):
        assert scored("changes_its_arguments", "length", given=given) == [[4, 4], [1, 0]]
    assert columns[0] == {"prompt": [{"role": "user", "content": "hello"}], "steps": ["a", {"b": [1]}]}


def test_empty_and_strange_responses_are_scored_like_others():
    texts = ("", "\N{PILE OF POO}\ud800\x00\n")
    given = RewardRows.of([{"prompt": "\u202e"}] * 2, texts=texts, token_ids=[[], [1]])
    assert scored("length", "tokens", given=given) == [[0, 4], [0, 1]]
    with pytest.raises(RunError, match=r"returned nan for the response '.*\\ud800\\x00\\n' to the prompt '\\u202e'"):
        scored("not_a_number", given=given)


def test_no_rows_and_many_rows():
    assert load("length", "scorer").score(rows([], ())).shape == (0, 2)
    some = load("length", "scorer").score(rows([None, COLUMNS[0], None])).T.tolist()
    assert [[value == value and value for value in column] for column in some] == [[False, 4, False], [False, 1, False]]
    assert load("raises", "raises_later").score(rows([None] * 3)).isnan().all()  # it is not called at all
    many = rows([{"prompt": "p", "data": [1, 2, 3]}] * 20_000, ("abc",) * 20_000)
    assert load("length").score(many).tolist() == [[3.0]] * 20_000


def test_metrics_of_functions_are_means_since_the_last_time():
    functions = load("logs")
    functions.score(rows())
    functions.score(rows(texts=("abcd",) * 3))
    assert functions.metrics() == {"reward/log/longest": (14 + 4) / 2, "reward/log/calls": 1.0}
    assert functions.metrics() == {}
    assert load().metrics() == {}


def test_the_progress_of_training_is_given_where_it_is_asked_for():
    assert scored("progress", given=rows(step=3, total_steps=12)) == [[0.25] * 3]


def test_async_functions_wait_at_the_same_time_and_always_on_one_loop():
    reward_examples.MEETING.clear()
    functions = load("first_to_meet", "second_to_meet", "scorer", reward_timeout_s=20.0)
    for _ in range(2):
        assert functions.score(rows()).tolist() == [[0, 0, 1]] * 3
    assert len(reward_examples.MEETING) == 4
    assert len(set(map(id, reward_examples.MEETING))) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "raises",
            r"raised KeyError: 'answer' \(reward_examples\.py, line \d+\) on the response '\\\\boxed\{4\}' to",
        ),
        (
            "raises_on_rome",
            r"raised ValueError: no Rome \(.*\) on the response 'Rome' to the prompt 'capital of",
        ),
        (
            "raises_on_two",
            r"raised ValueError: too many \(reward_.* on 3 responses, such as the response '\\\\boxed",
        ),
        (
            "raises_later",
            r"raised ConnectionError: refused \(reward_examples\.py, line \d+\) on the response '\\\\b",
        ),
        ("exits", r"raised SystemExit: 0 \(reward_examples\.py, line \d+\) on the response"),
        ("exits_later", r"raised SystemExit: 0 \(reward_examples\.py, line \d+\) on the response"),
        ("cancels_itself", r"raised CancelledError \(.*\) on the response"),
        ("endless_error", r"raised ValueError: x{280,300}\.\.\. \("),
        ("too_few", r"returned 1 scores for 3 responses; expected a list of 3 scores"),
        ("one_number", r"returned 1\.0; expected a list of 3 scores"),
        ("words", r"returned 'good' for the response '\\\\boxed\{4\}' to the prompt '2 \+ 2'; expected"),
        ("not_a_number", r"returned nan for the response 'Rome' to the prompt 'capital of France'; expected"),
        ("huge", r"returned 1e\+39 for the response"),
        ("a_set", r"returned \{1\.0\}; expected a list of 3 scores"),
        ("too_few_yielded", r"returned 1 scores for 3 responses"),
    ],
)
def test_what_is_no_score_ends_the_run_with_its_source_and_row(name, message):
    with pytest.raises(RunError, match=rf"^ppo\.rewards\[1\]=tests\.reward_examples:{name} {message}") as found:
        scored("length", name)
    assert "ppo.reward_on_error=drop" in str(found.value)
    assert "return None for a response that it cannot score" in str(found.value)


def test_rows_that_fail_are_left_out_if_that_is_asked_for(caplog):
    found = scored("raises_on_b", "length", given=rows(texts=("a", "b", "cc")), reward_on_error=RewardErrors.drop)
    assert found == [[1, INF, 1], [1, 1, 2]]
    assert "left out 1 of 3 responses: ppo.rewards[0]=tests.reward_examples:raises_on_b raised ValueError: no b" in (
        caplog.text
    )
    assert "the response 'b' to the prompt 'capital of France'" in caplog.text
    assert scored("raises_later", reward_on_error=RewardErrors.drop) == [[INF] * 3]


@pytest.mark.parametrize("name", ["hangs", "hangs_politely", "hangs_the_loop"])
def test_a_call_that_takes_too_long_is_an_error_whoever_is_to_blame(name):
    message = rf"{name} took longer than ppo\.reward_timeout_s=0\.2 seconds for 3 responses, such as the response"
    with pytest.raises(RunError, match=rf"{message}.*raise that setting, or leave.*ppo\.reward_on_error=drop\.$"):
        scored(name, reward_timeout_s=0.2)


@pytest.mark.parametrize("name", ["hangs_on_rome", "waits_on_rome", "blocks_on_rome"])
def test_a_response_that_takes_too_long_is_left_out_and_the_loop_goes_on(name, caplog):
    functions = load(name, "scorer", reward_timeout_s=0.9, reward_on_error=RewardErrors.drop)
    for _ in range(2):
        assert functions.score(rows()).T.tolist() == [[1, INF, 1], [1, 1, 1]]
    assert (
        f"left out 1 of 3 responses: ppo.rewards[0]=tests.reward_examples:{name} took longer than 0.3 seconds, its "
        in (caplog.text)
    )
    assert "share of ppo.reward_timeout_s, for the response 'Rome' to the prompt 'capital of France'" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Scorer",
            r"found a class; expected a function, .*such as one that its file has made with `sc.* = Scorer\(\)`",
        ),
        ("by_place", "completions cannot be given by name"),
        ("needs_prompt", "needs prompt, which is not given here; make it optional"),
        ("needs_environments", "needs environments, which is not given here; make it optional"),
        ("not_callable", "found a int; expected a function"),
        ("nothing", "no such function"),
        ("no.such.module:function", r"no such function \(No module named 'no'\)"),
        ("math:gcd", "takes neither completions nor completion_ids"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_when_it_is_loaded(name, message):
    with pytest.raises(ValueError, match=rf"^ppo\.rewards\[0\]=\S+: {message}"):
        load(name)


def test_columns_that_the_data_lack_are_found():
    functions = load("accuracy", "optional", "math_only")
    assert missing_columns(functions, COLUMNS) == {}
    lacking = missing_columns(functions, [{"prompt": "a"}, {"task": "math"}])
    assert {name: function.name for name, function in lacking.items()} == {"ground_truth": "accuracy"}


def _on_a_rank(name):
    rank = torch.distributed.get_rank()
    texts = ("a", "b") if rank else ("a", "c")
    functions = load(name)
    try:
        found = functions.score(rows([{"prompt": f"of rank {rank}"}] * 2, texts)).tolist()
        return functions.metrics() or found
    except RunError as error:
        return str(error)


def test_every_rank_has_its_own_rows_judged_and_an_error_on_one_ends_all():
    assert run_on_ranks(_on_a_rank, 2, "length") == [[[1], [1]]] * 2
    first, second = run_on_ranks(_on_a_rank, 2, "raises_on_b")
    assert first == second
    assert "raised ValueError: no b" in first
    assert "on the response 'b' to the prompt 'of rank 1'" in first
    assert run_on_ranks(_on_a_rank, 2, "exits_on_b")[0].startswith(
        "ppo.rewards[0]=tests.reward_examples:exits_on_b raised"
    )


def test_metrics_of_functions_are_those_of_all_ranks():
    assert run_on_ranks(_on_a_rank, 2, "logs_on_b") == [{"reward/log/found": 7.0}] * 2
