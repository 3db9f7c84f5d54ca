"""A report says what a run has left, whatever state that is in, and nothing in it can run but its own script."""

import http.client
import json
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf.tracking.report.index import write_index
from rlhf.tracking.report.live import server_of
from rlhf.tracking.report.page import difference, page, visible, write_report
from rlhf.tracking.report.record import read_run

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202etxt\ud800"
PROMPTS = [f"prompt {number}" for number in range(9)] + [EVIL]


def write(folder, name, rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    """A run of three stages, in which the policy says what it is asked, and then the same in capitals."""
    folder = tmp_path / "a run"
    evaluation = {"eval/score": 0.25, "eval/kl": 0.0, "gold/rating": 1.5}
    later = {"eval/score": 0.75, "eval/kl": 4.0, "gold/rating": 1.25}
    steps = [{"step": step, "objective/kl": step / 2, "timing_s/train": 1.0, "policy/loss": None} for step in (1, 2)]
    write(folder, "ppo/metrics.jsonl", [{"step": 0, **evaluation}, *steps, {"step": 3, **later}])
    answers = [("first", str.lower, 0.0), ("then", str.upper, 4.0)]
    rows = [
        {
            "step": 3 * at,
            "prompt": p,
            "response": f"{word} {change(p)}",
            "score": at + i / 9,
            "kl": kl,
            "length": 5 + i % 2,
        }
        for at, (word, change, kl) in enumerate(answers)
        for i, p in enumerate(PROMPTS)
    ]
    write(folder, "ppo/samples.jsonl", rows)
    write(folder, "ppo/stage.json", [{"before": evaluation, "after": later}])
    write(folder, "ppo/summary.json", [{"memory/train_host_bytes": 2.0e9}])
    write(folder, "plan.json", [{"ppo": {"train": {"device": 0, "host": 1_000_000_000}}}])
    for stage, metric in (("sft", "eval/loss"), ("reward", "eval/accuracy")):
        write(
            folder,
            f"{stage}/metrics.jsonl",
            [{"step": 0, metric: 0.5, "train/loss": 1.0}, {"step": 1, "train/loss": 0.5}],
        )
        write(folder, f"{stage}/stage.json", [{"before": {metric: 0.5}, "after": {metric: 0.625}}])
        write(folder, f"{stage}/summary.json", [{metric: 0.625}])
    (folder / "config.yaml").write_text(f"name: {visible(EVIL)}\n")
    (folder / "plan.txt").write_text("the plan\n")
    write(folder, "origin.jsonl", [{"command": "python first", "ranks": 1}, {"command": f"python {EVIL}", "ranks": 2}])
    return folder


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_a_report_is_one_file_that_asks_nobody_for_anything(run):
    html = write_report(run).read_text(encoding="utf-8")
    found = Tags(html)
    asked = [
        value
        for _, attributes in found.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert asked
    assert all(address.startswith("#") for address in asked)
    assert "url(http" not in html
    (policy,) = [a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert sum(tag == "script" for tag, _ in found.tags) == 1


def test_what_a_model_says_neither_runs_nor_hides(run):
    html = write_report(run).read_text(encoding="utf-8")
    found = Tags(html)
    assert not [tag for tag, _ in found.tags if tag == "img"]
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert "alert(1)" in found.text
    for hidden in ("\x1b", "\u202e", "\ud800"):
        assert hidden not in html
    assert r"\u202etxt\ud800" in found.text


def test_a_report_shows_headlines_samples_curves_memory_and_signs(run):
    html = page(read_run(run))
    assert re.search(r"eval/score</td><td class=.number.>0.25</td><td class=.number.>0.75</td>", html)
    assert html.count("<article") == len(PROMPTS)
    for title in ("Reward against KL", "objective/kl", "Time of ppo", "Memory of ppo", "train/loss"):
        assert f'aria-label="{title}"' in html, title
    assert "policy/loss was not finite at step 1" in html
    assert "Missing from this report" not in html


def test_a_report_says_how_the_run_was_started(run):
    text = Tags(page(read_run(run))).text
    assert f"python {visible(EVIL)}" in text
    assert "2, the last is shown" in text
    assert "python first" not in text


def test_a_stage_has_a_report_of_its_own(run):
    html = write_report(run / "reward").read_text(encoding="utf-8")
    assert (run / "reward/report.html").exists()
    assert "<h1>a run/reward</h1>" in html
    assert "eval/accuracy" in html
    assert "eval/score" not in html


def test_words_that_came_and_went_are_marked():
    assert difference("a good film", "a great film") == "a <del>good</del> <ins>great</ins> film"
    assert difference("", "<b>") == "<ins>&lt;b&gt;</ins>"


def test_what_is_missing_or_broken_is_said_and_the_rest_is_shown(run):
    for name in ("plan.json", "ppo/samples.jsonl"):
        (run / name).unlink()
    with (run / "sft/metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "train/loss": 0.4}\nnot json\n{"no": "step"}\n\xff\xfe\n{"step": 3, "tr')
    (run / "reward/stage.json").write_text("{")
    html = page(read_run(run))
    for said in (
        "plan.json is missing",
        "ppo/samples.jsonl is missing",
        "sft/metrics.jsonl: 4 lines are no rows with a step (4, 5, 6, 7)",
        "reward/stage.json is not JSON",
    ):
        assert said in html, said
    assert 'aria-label="train/loss"' in html


def test_values_of_odd_types_are_left_out(run):
    (run / "plan.json").write_text('{"ppo": {"train": 3, "save": {"host": "much"}}}')
    with (run / "ppo/samples.jsonl").open("a") as file:
        for score in ('"high"', "NaN", "[]", "null"):
            file.write(f'{{"step": 3, "prompt": "p", "response": 7, "score": {score}}}\n')
            file.write(f'{{"step": 0, "prompt": "p", "response": null, "score": {score}}}\n')
    assert page(read_run(run)).count("<article") == len(PROMPTS) + 4


@pytest.mark.filterwarnings("error")
def test_odd_names_and_numbers_break_no_chart(run):
    odd = {"gold/$x_{$": 1.0, "gold/<b>\u65e5\u202e": 2.0, "gold/": 3.0, "odd/\x00\x1b": 4.0, "timing_s/$y$": 5.0}
    rows = [{"step": step, "eval/kl": step, **odd} for step in (10, 11)]
    rows += [{"step": 12, "odd/size": sign * 1.7e308, "odd/whole": 10**400} for sign in (1, -1)]
    with (run / "ppo/metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*rows, {"step": 10**400}, {"step": True}])
    html = page(read_run(run))
    assert 'aria-label="gold/$x_{$"' in html
    assert "gold/&lt;b&gt;\u65e5\\u202e" in html
    assert 'aria-label="odd/whole"' not in html
    assert "2 lines are no rows with a step" in html
    assert not set(html) & {"\x00", "\x1b", "\u202e"}


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    (tmp_path / "sft").mkdir()
    assert "Nothing was logged" in page(read_run(tmp_path))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no run is there. Expected a folder with sft/"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="no run is there"):
        write_index(tmp_path)


def test_many_runs_have_a_line_each(run):
    write_report(run)
    other = run.parent / "deeper/other"
    (other / "sft").mkdir(parents=True)
    (other / "sft/stage.json").write_text("[")
    html = write_index(run.parent).read_text(encoding="utf-8")
    assert html.count("<tr><td>") == 2
    assert 'href="a%20run/report.html"' in html
    assert "0.75" in html
    assert "sft/stage.json is not JSON" in html


def test_the_command_writes_the_report_or_says_what_is_wrong(run):
    def call(folder):
        command = [sys.executable, "-m", "rlhf.tracking.report", str(folder)]
        return subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)

    assert call(run).stdout == f"{run / 'report.html'}\n"
    assert (run / "report.html").exists()
    failed = call(run / "nothing")
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: {run / 'nothing'}: no run is there")


def test_a_live_report_follows_the_run_and_answers_this_machine_only(run):
    def ask(path="/", host="127.0.0.1"):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=600)
        connection.request("GET", path, headers={"Host": f"{host}:{server.server_port}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    (run / "ppo/stage.json").unlink()
    with server_of(run, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert server.server_address[0] == "127.0.0.1"
        status, html = ask()
        assert status == 200
        assert "ppo at step 3" in html
        assert '<meta http-equiv="refresh"' in html
        with (run / "ppo/metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "objective/kl": 3.0}\n')
        assert "ppo at step 4" in ask()[1]
        assert ask(host="evil.example")[0] == ask(path="/etc/passwd")[0] == 404
        server.shutdown()
