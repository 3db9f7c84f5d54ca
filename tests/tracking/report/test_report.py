"""A report says what a run has left, whatever state that is in, and nothing in it can run but its own script."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf.tracking.report import __main__ as command
from rlhf.tracking.report.page import difference, page, visible, write_index, write_report
from rlhf.tracking.report.run_folder import read_run

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
    steps = [{"step": step, "objective/kl": step / 2, "timing_s/train": 1.0, "actor/loss": None} for step in (1, 2)]
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


def test_a_policy_is_shown_by_the_name_of_what_trained_it(run):
    (run / "ppo").rename(run / "grpo")
    record = read_run(run)
    assert [stage.name for stage in record.stages] == ["sft", "reward", "grpo"]
    assert record.policy.name == "grpo"
    assert record.notes == []
    assert '<section id="grpo"><h2>grpo</h2>' in page(record)
    assert write_report(run / "grpo").exists()


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


def result(html, metric):
    """The cells of a metric in the table of results, without its meaning."""
    (row,) = [row for row in re.findall(r"<tr>(.*?)</tr>", html) if f">{metric}</td>" in row]
    return re.findall(r"<td[^>]*>(.*?)</td>", row)[:-1]


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
    assert result(html, "eval/score") == ["ppo", "eval/score", "0.25", "0.75", "1 [1, 1]", "better", "score"]
    assert html.count("<article") == len(PROMPTS)
    for title in ("Reward against KL", "objective/kl", "Time of ppo", "Memory of ppo", "train/loss"):
        assert f'aria-label="{title}"' in html, title
    assert "actor/loss was not finite at step 1" in html
    assert "Missing from this report" not in html


def test_a_change_has_an_interval_and_a_mark_that_knows_what_is_better(run):
    later = {"eval/accuracy": 0.75, "eval/loss": 0.4, "eval/pairs": 100.0, "eval/score_mean": 2.0}
    before = {"eval/accuracy": 0.5, "eval/loss": 0.5, "eval/pairs": 100.0, "eval/score_mean": 1.0}
    write(run, "reward/stage.json", [{"before": before, "after": later}])
    html = page(read_run(run / "reward"))
    assert result(html, "eval/accuracy")[4:6] == ["0.25 [0.116, 0.372]", "better"]  # Newcombe 1998, method 10
    assert result(html, "eval/loss")[4:6] == ["no interval", "better"]
    assert result(html, "eval/score_mean")[4:6] == ["", ""]  # neither direction is the better one
    write(run, "reward/stage.json", [{"before": before, "after": later | {"eval/accuracy": 0.45}}])
    assert result(page(read_run(run / "reward")), "eval/accuracy")[5] == "unclear"
    html = page(read_run(run))
    assert result(html, "eval/kl")[4:6] == ["4 [4, 4]", ""]


def test_what_was_warned_of_stays_and_what_could_not_be_checked_is_named(run):
    steps = [{"step": step, "objective/kl_per_token": kl} for step, kl in ((1, 0.1), (2, 1.5), (3, 0.1))]
    evaluations = [{"step": step, "eval/score": 0.0} for step in (0, 3)]
    write(run, "ppo/metrics.jsonl", [evaluations[0], *steps, evaluations[1]])
    answers = [{"step": step, "prompt": p, "response": p, "score": 0.0} for step in (0, 3) for p in PROMPTS[:3]]
    write(run, "ppo/samples.jsonl", answers)
    text = " ".join(Tags(page(read_run(run))).text.split())
    assert "KL to the reference is 1.5 nats per token at step 2" in text
    assert "First at step 2, last at step 2, and no longer so after that." in text
    assert "KL has not run away" not in text
    unchecked = re.search("ppo, not checked ?whether ([^:]*not become[^:]*): there are answers to 3 held-out", text)
    assert "answers have not become repetitive" in unchecked[1]
    assert "score and gold metric have not parted: data.gold names no metric" in text
    (fine,) = re.findall("ppo, checked and fine ?(.*?)[.] ", text)
    assert fine == "all numbers are finite"


def test_a_reward_model_that_is_a_coin_is_in_the_report_of_its_run_and_of_ppo(run):
    after = {"eval/accuracy": 0.5, "eval/pairs": 16.0, "eval/score_std": 0.006}
    write(run, "reward/metrics.jsonl", [{"step": 0, **after}, {"step": 9, **after}])
    known = {f"reward_model/{key.split('/')[1]}": value for key, value in after.items()}
    write(run, "ppo/metrics.jsonl", [{"step": 0, **known}])
    for folder, step in ((run / "reward", 9), (run / "ppo", 0)):
        text = Tags(page(read_run(folder))).text
        for said in ("50% of 16 held-out pairs", "no better than a coin", "deviate by 0.006", f"At step {step}."):
            assert said in text, said


def open_sections(run, stage):
    html = page(read_run(run / stage))
    return re.findall("<details open><summary>([^<]*)", html)


def test_training_curves_are_open_and_evaluations_where_they_are_more_than_two_points(run):
    two = [{"step": step, "eval/loss": 1.0, "eval/margin": 1.0} for step in (0, 4)]
    write(run, "reward/metrics.jsonl", [two[0], *({"step": s, "train/loss": 1.0} for s in (1, 2, 3)), two[1]])
    assert open_sections(run, "reward") == ["Training"]
    with (run / "reward/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "eval/loss": 1.0, "train/lr": 1.0}\n')
    assert open_sections(run, "reward") == ["Evaluation", "Training"]
    assert 'aria-label="train/lr"' not in page(read_run(run))  # one point is no curve


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
        "sft/metrics.jsonl: 4 lines are not rows with a step (4, 5, 6, 7)",
        "reward/stage.json is not JSON",
    ):
        assert said in html, said
    assert 'aria-label="train/loss"' in html


def test_a_stage_that_was_resumed_twice_has_each_step_once_and_in_order(run):
    """Rows that a kill has left behind come a second time; W&B's copy or a hand may have left them so."""
    steps = [2, 3, 0, 1, 2, 3, 4, 3, 4, 5]
    rows = [{"step": step, "train/loss": 10.0 * step + place} for place, step in enumerate(steps)]
    write(run, "sft/metrics.jsonl", [*rows, {"step": 5, "eval/loss": 0.5}])
    (stage,) = [stage for stage in read_run(run).stages if stage.name == "sft"]
    assert stage.series("train/loss") == [(0, 2.0), (1, 13.0), (2, 24.0), (3, 37.0), (4, 48.0), (5, 59.0)]
    assert stage.series("eval/loss") == [(5, 0.5)]


def test_what_never_changed_is_said_in_a_line(run):
    with (run / "sft/metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step": {step}, "train/lr": 0.25}}\n' for step in (1, 2))
    html = page(read_run(run / "sft"))
    assert "<dt>train/lr</dt><dd>0.25</dd>" in html
    assert 'aria-label="train/lr"' not in html


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
    rows = [{"step": step, "eval/kl": step, **{key: step * value for key, value in odd.items()}} for step in (10, 11)]
    rows += [{"step": 12, "odd/size": sign * 1.7e308, "odd/whole": 10**400} for sign in (1, -1)]
    with (run / "ppo/metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*rows, {"step": 10**400}, {"step": True}])
    html = page(read_run(run))
    assert 'aria-label="gold/$x_{$"' in html
    assert "gold/&lt;b&gt;\u65e5\\u202e" in html
    assert 'aria-label="odd/whole"' not in html
    assert "2 lines are not rows with a step" in html
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
    assert html.count("<tr><td") == 2
    assert 'href="a%20run/report.html"' in html
    assert "0.75" in html
    assert "sft/stage.json is not JSON" in html


def test_runs_are_compared_by_their_results(run):
    other = run.parent / "other"
    shutil.copytree(run, other)
    (other / "ppo/stage.json").unlink()
    html = write_index(run.parent).read_text(encoding="utf-8")
    headings = re.findall(r"<th(?: [^>]*)?>(.*?)</th>", html)
    results = ["sft eval/loss", "reward eval/accuracy", "ppo eval/score", "ppo eval/kl", "ppo gold/rating"]
    assert headings == ["run", "finished", "begun", *results, ""]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(<td.*?)</tr>", html, re.DOTALL)]
    assert rows[0][1:] == ["sft reward ppo", "", "0.625", "0.625", "0.75", "4", "1.25", ""]
    assert rows[1][1:] == ["sft reward", "ppo", "0.625", "0.625", "–", "–", "–", ""]
    (policy,) = [a["content"] for tag, a in Tags(html).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_a_report_does_not_wait_for_torch():
    script = "import sys, rlhf.tracking.report.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[3], check=False).returncode == 0


def test_the_command_writes_the_report_or_says_what_is_wrong(run):
    def call(*words):
        words = [sys.executable, "-m", "rlhf.tracking.report", *map(str, words)]
        return subprocess.run(words, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)

    assert call(run).stdout == f"{run / 'report.html'}\n"
    assert (run / "report.html").exists()
    for options in ([], ["--follow"]):
        failed = call(run / "nothing", *options)
        assert failed.returncode == 1
        assert failed.stderr.startswith(f"error: {run / 'nothing'}: no run is there")
    assert "--serve is no longer there: use --follow" in call(run, "--serve", 8080).stderr


def test_a_followed_run_has_a_page_that_shows_what_it_has_written_until_its_policy_is_trained(run, monkeypatch):
    live, record, pages = run / "live.html", run / "ppo/stage.json", []
    finished = record.read_text()
    record.unlink()

    def go_on(seconds):
        """Instead of waiting: look at the page, and let the run write something."""
        pages.append((live.stat().st_mtime_ns, live.read_text()))
        if len(pages) == 1:
            with (run / "ppo/metrics.jsonl").open("a") as file:
                file.write('{"step": 4, "objective/kl": 3.0}\n')
        elif len(pages) == 3:
            record.write_text(finished)

    monkeypatch.setattr(command.time, "sleep", go_on)
    command.follow(run)
    assert ["ppo at step 3" in html for _, html in pages] == [True, False, False]
    assert ["ppo at step 4" in html for _, html in pages] == [False, True, True]
    assert all('<meta http-equiv="refresh"' in html for _, html in pages)
    assert pages[1][0] == pages[2][0]  # nothing was written, so nothing was drawn
    assert "ppo finished" in live.read_text()
    assert "refresh" not in live.read_text()
    assert not (run / "report.html").exists()
