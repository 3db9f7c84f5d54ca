"""Reward functions are called as TRL calls them, and whatever goes wrong names the source, the row and what to do."""

import http.server
import json
import math
import threading

import pytest
import torch

from rlhf.config.reward_config import RewardErrors, RewardSettings
from rlhf.reward_functions import RewardFunctions, RewardRows, missing_columns
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
        ("raises", r"raised KeyError: 'answer' \(reward_examples\.py, line \d+\) on one of 3 responses, such as the "),
        ("raises_later", r"raised ConnectionError: refused \(reward_examples\.py, line \d+\) on"),
        ("too_few", r"returned 1 scores for 3 responses; expected a list of 3 scores"),
        ("one_number", r"returned 1\.0; expected a list of 3 scores"),
        ("words", r"returned 'good' for the response '\\\\boxed\{4\}' to the prompt '2 \+ 2'; expected"),
        ("not_a_number", r"returned nan for the response 'Rome' to the prompt 'capital of France'; expected"),
        ("huge", r"returned 1e\+39 for the response"),
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
@pytest.mark.parametrize("on_error", list(RewardErrors))
def test_a_call_that_takes_too_long_is_an_error_whoever_is_to_blame(name, on_error):
    with pytest.raises(RunError, match=rf"{name} took longer than ppo\.reward_timeout_s=0\.2 seconds"):
        scored(name, reward_timeout_s=0.2, reward_on_error=on_error)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("by_place", "completions cannot be given by name"),
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
    try:
        return load(name).score(rows([{"prompt": f"of rank {rank}"}] * 2, texts)).tolist()
    except RunError as error:
        return str(error)


def test_every_rank_has_its_own_rows_judged_and_an_error_on_one_ends_all():
    assert run_on_ranks(_on_a_rank, 2, "length") == [[[1], [1]]] * 2
    first, second = run_on_ranks(_on_a_rank, 2, "raises_on_b")
    assert first == second
    assert "raised ValueError: no b" in first
    assert "to the prompt 'of rank 1'" in first


class Server(http.server.BaseHTTPRequestHandler):
    """A reward model behind HTTP: the length of each text; its first answer to a client is an error."""

    def do_POST(self):
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["texts"]
        self.server.requests.append(texts)
        if self.path == "/hang":
            self.server.released.wait()
        if len(self.server.requests) == 1:
            self.send_error(503)
            return
        body = json.dumps({"scores": [len(text) for text in texts]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


CLIENT = """
import json, urllib.error, urllib.request

def ask(path, texts):
    request = urllib.request.Request("http://127.0.0.1:{port}" + path, json.dumps({{"texts": texts}}).encode())
    for attempt in range(3):
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)["scores"]
        except urllib.error.HTTPError:
            continue

def served(prompts, completions):
    return ask("/score", [prompt + reply for prompt, reply in zip(prompts, completions)])

def hanging(prompts, completions):
    return ask("/hang", completions)
"""


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as found:
        found.requests, found.released, found.daemon_threads = [], threading.Event(), True
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.released.set()
        found.shutdown()
        thread.join()


def test_a_reward_model_behind_http_is_asked_once_for_all_rows_and_may_not_hang(server, tmp_path):
    (tmp_path / "client.py").write_text(CLIENT.format(port=server.server_address[1]))
    found = scored(f"{tmp_path}/client.py:served")
    assert found == [[len(row["prompt"] + text) for row, text in zip(COLUMNS, TEXTS, strict=True)]]
    assert [len(texts) for texts in server.requests] == [3, 3]  # the second is the client's own retry
    with pytest.raises(RunError, match=r"client\.py:hanging took longer than ppo\.reward_timeout_s=0\.3"):
        scored(f"{tmp_path}/client.py:hanging", reward_timeout_s=0.3)
