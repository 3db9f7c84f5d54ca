"""The report shows every comparison, and nothing that a model says can run in it."""

import json
import re

import pytest

from rlhf.tracking.report.page import MOST_COMPARED, page, write_report
from rlhf.tracking.report.run_folder import read_run
from tests.evaluation.test_result_tables import RESULTS
from tests.tracking.report.test_report import EVIL, Tags


def leave(folder, name="", *, results=RESULTS, samples=None):
    place = folder / "eval" / name
    place.mkdir(parents=True, exist_ok=True)
    place.joinpath("results.json").write_text(results if isinstance(results, str) else json.dumps(results))
    said = {"response": "fine", "score": 1.5, "length": 3.0}
    rows = samples or [{"prompt": "p", "model": said, "baseline": said, "preferences": {"reward": 0.0, "human": None}}]
    place.joinpath("samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_evaluation_alone_is_a_run(tmp_path):
    leave(tmp_path)
    (tmp_path / "eval/config.yaml").write_text("name: the settings\n")
    (tmp_path / "origin.jsonl").write_text('{"command": "python run_pipeline.py stage=eval"}\n')
    html = write_report(tmp_path).read_text()
    text = Tags(html).text
    assert "Missing from this report" not in text
    for expected in ("Evaluation", "0.625 [0.25, 0.875]", "far away", "longest", "Calibration", "the settings"):
        assert expected in text
    for expected in ("1 of 1 answers", "stage=eval"):
        assert expected in text
    assert "reward prefers the model" in text
    assert "human prefers" not in text
    assert '<svg role="img" aria-label="Calibration"' in html


def test_comparisons_stand_beside_each_other(tmp_path):
    leave(tmp_path, "zebra")
    leave(tmp_path)
    leave(tmp_path, "early")
    assert [found.name for found in read_run(tmp_path).evaluations] == ["", "early", "zebra"]
    text = Tags(page(read_run(tmp_path))).text
    assert "Evaluation: early" in text


def test_nothing_that_is_said_can_run(tmp_path):
    said = {"response": EVIL, EVIL: 1.0}
    judges = {EVIL: RESULTS["judges"]["reward"]}
    quality = RESULTS["reward_model"] | {"subsets": {EVIL: RESULTS["reward_model"]["subsets"]["hard"]}}
    measures = [dict.fromkeys(("name", "unit", "meaning"), EVIL)]
    results = {**RESULTS, "model": EVIL, "measures": measures, "judges": judges, "reward_model": quality}
    samples = [{"prompt": EVIL, "model": said, "baseline": said, "preferences": {EVIL: 1.0}}]
    leave(tmp_path, results=results, samples=samples)
    html = page(read_run(tmp_path))
    tags = Tags(html)
    assert [tag for tag, _ in tags.tags].count("script") == 1
    assert not [tag for tag, attributes in tags.tags if tag == "img" or "onerror" in attributes]
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert tags.text.count("alert(1)") >= 9


@pytest.mark.parametrize("broken", ["", "{", "[]", "null"])
def test_a_broken_file_breaks_no_report(tmp_path, broken):
    leave(tmp_path, results=broken)
    assert re.search("eval/results.json is not (a JSON object|JSON)", page(read_run(tmp_path)))


def test_samples_that_are_no_rows_are_left_out_and_a_page_stays_small(tmp_path):
    leave(tmp_path, samples=[{"prompt": "p", "model": {"response": "x"}}] * (MOST_COMPARED + 5) + [3, {"model": "odd"}])
    run = read_run(tmp_path)
    said = f"eval/samples.jsonl: 1 lines are not rows ({MOST_COMPARED + 6}); they were left out."
    assert [note for note in run.notes if "samples" in note] == [said]
    html = page(run)
    assert f"{MOST_COMPARED} of {MOST_COMPARED + 6} answers side by side" in html
    assert html.count("<article") == MOST_COMPARED


def test_a_missing_samples_file_is_said(tmp_path):
    leave(tmp_path)
    (tmp_path / "eval/samples.jsonl").unlink()
    run = read_run(tmp_path)
    assert [note for note in run.notes if "samples.jsonl" in note] == ["eval/samples.jsonl is missing."]
