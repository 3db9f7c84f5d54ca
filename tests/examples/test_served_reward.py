"""A reward model behind HTTP, as a user has it: a real server on the loopback device that fails in every way."""

import json
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from examples import served_reward
from rlhf.config.run_config import Embedded
from rlhf.models.embedded import prepare
from tests.stages.test_pipeline import pipeline, rows

ROOT = Path(__file__).parents[2]
SOURCE = f"{ROOT}/examples/served_reward.py:served"
REPLIES = {
    "fine": lambda scores: json.dumps({"scores": scores}),
    "none": lambda scores: json.dumps({"scores": [None] * len(scores)}),
    "short": lambda scores: json.dumps({"scores": scores[1:]}),
    "bare": json.dumps,
    "words": lambda scores: json.dumps({"scores": ["good"] * len(scores)}),
    "html": lambda scores: "<html>busy</html>",
}


class Handler(BaseHTTPRequestHandler):
    """Scores a text by its length; each request meets the next of the server's troubles, and the last one stays."""

    def do_POST(self):
        server = self.server
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["texts"]
        server.requests.append(texts)
        trouble = server.troubles.pop(0) if len(server.troubles) > 1 else server.troubles[0]
        if isinstance(trouble, int):
            self.send_error(trouble)
        elif trouble == "hang":
            server.released.wait()
        elif trouble == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            reply = REPLIES["fine" if trouble == "cut" else trouble]([float(len(text)) for text in texts]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply) + (trouble == "cut")))  # one byte too many never comes
            self.end_headers()
            self.wfile.write(reply)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.requests, found.troubles, found.released, found.daemon_threads = [], ["fine"], threading.Event(), True
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("REWARD_URL", f"http://127.0.0.1:{found.server_address[1]}/score")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which nobody answers
        monkeypatch.setattr(served_reward, "FIRST_PAUSE_S", 0.01)
        yield found
        found.released.set()
        found.shutdown()
        thread.join()


def test_all_responses_go_in_one_request(server):
    assert served_reward.served(["p", "qr"], ["abc", ""]) == [4.0, 2.0]
    assert server.requests == [["pabc", "qr"]]
    server.troubles = ["none"]
    assert served_reward.served(["p"], ["a"], answer=["b"]) == [None]
    messages = [{"role": "user", "content": "é"}], [{"role": "assistant", "content": "\ud800"}]
    served_reward.served(*[[part] for part in messages])
    assert server.requests[-1] == [[*messages[0], *messages[1]]]


@pytest.mark.parametrize("trouble", [503, 429, "reset", "cut"])
def test_what_may_go_away_is_tried_again(server, trouble):
    server.troubles = [trouble, trouble, "fine"]
    assert served_reward.served(["p"], ["abc"]) == [4.0]
    assert server.requests == [["pabc"]] * 3
    server.troubles = [trouble]
    with pytest.raises(
        ConnectionError, match=r"^http://127.*/score gave no answer in 6 tries; the last one ended with"
    ):
        served_reward.served(["p"], ["abc"])
    assert len(server.requests) == 3 + 6


def test_a_server_that_does_not_answer_is_left_after_a_while_and_asked_again(server, monkeypatch):
    monkeypatch.setattr(served_reward, "TIMEOUT_S", 0.2)
    server.troubles = ["hang", "fine"]
    assert served_reward.served(["p"], ["abc"]) == [4.0]
    server.troubles = ["hang"]
    with pytest.raises(ConnectionError, match="in 6 tries; the last one ended with: timed out"):
        served_reward.served(["p"], ["abc"])


@pytest.mark.parametrize("trouble", [400, 404, "short", "bare", "html"])
def test_what_will_not_go_away_is_an_error_at_once(server, trouble):
    server.troubles = [trouble]
    with pytest.raises(ValueError, match=r"refused the request: HTTP status 40|expected 1 scores|Expecting value"):
        served_reward.served(["p"], ["abc"])
    assert len(server.requests) == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return prepare(Embedded.tiny, tmp_path_factory.mktemp("tiny") / "model")


def run(model, folder, *overrides, ranks=1):
    """GRPO on the example, as a user runs it."""
    words = ["experiment=smoke", "stage=grpo", f"model.path={model}", "ppo.actor=${model.path}", f"output_dir={folder}"]
    words += ["ppo.iterations=1", "ppo.eval_prompts=4", "tracking.report=false", f"ppo.rewards=[{SOURCE}]"]
    return pipeline(*words, *overrides, ranks=ranks)


def test_a_run_goes_through_a_server_that_fails_first(server, model, tmp_path):
    server.troubles = [503, "reset", "fine"]
    done = run(model, tmp_path / "run", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    last = rows(tmp_path / "run/grpo/metrics.jsonl")[-1]
    assert last["reward/served"] > 0
    assert last["reward/served/none"] == 0
    for row in rows(tmp_path / "run/grpo/samples.jsonl"):
        assert row["reward/served"] == len(row["prompt"] + row["response"])
    # Two ranks, each of which asks once: before training, for the rollout, and after training; the first two again.
    assert sorted(map(len, server.requests)) == [2] * 6 + [8] * 2


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        ("short", "raised ValueError: the reward server answered \"{'scores': "),
        ("words", "returned 'good' for the response "),
        ("html", "raised JSONDecodeError: Expecting value: line 1 column 1 (char 0) (served_reward.py, line "),
        ("hang", "took longer than ppo.reward_timeout_s=1.5 seconds for 4 responses, such as the response "),
    ],
)
def test_a_run_ends_in_a_sentence_that_names_source_and_response(server, model, tmp_path, trouble, sentence):
    server.troubles = [trouble]
    done = run(model, tmp_path / "run", "ppo.reward_timeout_s=1.5")
    assert done.returncode == 1
    assert f"ppo.rewards[0]={SOURCE} {sentence}" in done.stderr
    assert re.search(r"the response '.*' to the prompt '.*'.*ppo\.reward_on_error=drop\.", done.stderr)
    assert "Traceback" not in done.stderr


def test_the_example_of_a_server_gives_the_scores_of_its_model(model, tmp_path):
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    judge.config.pad_token_id = tokenizer.pad_token_id
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    program = [sys.executable, str(ROOT / "examples/reward_server.py"), str(tmp_path / "judge"), "--port", "0"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[-1]
            messages = [{"role": "user", "content": "Good?"}, {"role": "assistant", "content": "Yes."}]
            texts = ["a good film", "bad", *(f"film {number}" for number in range(20)), messages]
            found = served_reward.ask(url, {"texts": texts})["scores"]
            with pytest.raises(ValueError, match="refused the request: HTTP status 400"):
                served_reward.ask(url, {"lines": texts})
        finally:
            process.terminate()
    plain = [*texts[:-1], tokenizer.apply_chat_template(messages, tokenize=False)]
    with torch.no_grad():
        expected = [float(judge(**tokenizer(text, return_tensors="pt")).logits) for text in plain]
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(found)) > 5
