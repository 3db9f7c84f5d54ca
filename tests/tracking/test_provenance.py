"""What is known of the starts of a run."""

import json
import sys

import torch

from rlhf.tracking import provenance


def test_every_start_adds_a_line_with_the_command_that_was_typed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_pipeline.py", "stage=sft", "name=my run"])
    monkeypatch.setenv("SECRET_KEY", "never to be seen")
    monkeypatch.setenv("RLHF_COMMAND", "of another run")
    provenance.remember_command()
    monkeypatch.setattr(sys, "argv", ["run_pipeline.py", "--worker", "config.yaml"])
    (tmp_path / provenance.FILE).write_text('{"half a li')  # a kill
    for ranks in (1, 2):
        provenance.record_start(tmp_path, ranks=ranks, device=torch.device("cpu"))
    text = (tmp_path / provenance.FILE).read_text()
    starts = [json.loads(line) for line in text.splitlines()]
    assert [start["ranks"] for start in starts] == [1, 2]
    assert starts[0]["command"] == "python run_pipeline.py stage=sft 'name=my run'"
    assert starts[0]["torch"] == torch.__version__
    assert "never to be seen" not in text


def test_a_copy_of_the_sources_that_is_no_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_SOURCES", tmp_path)
    assert provenance.provenance(ranks=1, device=torch.device("cpu"))["commit"] == ""
