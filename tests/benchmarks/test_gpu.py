"""The command for a machine with a GPU, at toy sizes on this one: every section runs, and none stops another."""

import math
import sys
import time

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import gpu, gpu_train
from benchmarks.gpu import SECTIONS, Report, Section, run
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_decode import cache_bytes, read_bytes
from benchmarks.gpu_ppo import PHASES
from benchmarks.gpu_seven import SHAPES, flops_of_token
from benchmarks.gpu_train import difference, verdict
from rlhf.models.causal_lm import causal_lm_module
from rlhf.runtime import dist

SEVEN = "7B, optimizer on the host"
PROGRAMS = ("tests", "smoke", "ppo")
"""Sections that start others."""


def bench(folder, *, seconds=3600.0, **fields):
    return Bench(**{"device": "cpu", "folder": folder, "ends": time.monotonic() + seconds, "isolated": False, **fields})


@pytest.fixture
def report(tmp_path):
    return Report.at(tmp_path / "gpu.md", "# On a GPU", keeps=False)


def sections_of(text):
    return [line[3:] for line in text.splitlines() if line.startswith("## ")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every section that needs no pipeline, in this process."""
    folder = tmp_path_factory.mktemp("gpu")
    report = Report.at(folder / "gpu.md", "# On a GPU", keeps=False)
    names = [name for name in SECTIONS if name not in PROGRAMS]
    fine = run(names, bench=bench(folder), report=report, about="a toy; ")
    dist.stop()
    return fine, report.path.read_text()


def test_every_section_runs_and_is_written_in_order(written):
    fine, text = written
    assert fine, text
    assert "failed" not in text.lower()
    assert sections_of(text) == [name for name in SECTIONS if name not in PROGRAMS]


@pytest.mark.parametrize(
    "row",
    ["zero0", "zero2_cpu", "zero3_cpu", "zero3_nvme", "plain PyTorch", "sft, zero3_nvme | train", "ppo, zero0", SEVEN],
)
def test_a_section_has_its_rows(written, row):
    _, text = written
    assert f"\n| {row} |" in text, text


def test_tiers_are_found_equal_and_our_decoding_to_be_that_of_transformers(written):
    _, text = written
    parity, decode = (text.split(f"## {name}\n")[1].split("\n## ")[0] for name in ("parity", "decode"))
    assert parity.count("| yes |") == 6
    assert decode.count("| 100% |") == 4


def test_the_pipeline_and_the_tests_are_run_as_programs(tmp_path, report, monkeypatch):
    monkeypatch.setattr(gpu_train, "OFFLOADS", {name: gpu_train.OFFLOADS[name] for name in ("zero0", "zero3_nvme")})
    assert run([*PROGRAMS], bench=bench(tmp_path), report=report), report.sections
    assert " skipped" in report.sections["tests"]
    assert "| zero3_nvme | 0.0e+00 | yes |" in report.sections["smoke"]
    assert "sequences/s**. DeepSpeed-Chat: 3.13" in report.sections["ppo"]
    assert all(f"| {phase} |" in report.sections["ppo"] for phase in PHASES)


def broken(bench):
    """A section that fails."""
    raise LookupError("no such kernel")


def whole(bench):
    """A section that does not."""
    return f"done in {bench.folder.name}"


def test_an_error_is_shown_with_its_traceback_and_does_not_stop_the_next(tmp_path, report, monkeypatch, capsys):
    sections = {"broken": Section(broken, 1, 9), "whole": Section(whole, 1, 9)}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    assert not run(["broken", "whole"], bench=bench(tmp_path), report=report)
    for text in (report.path.read_text(), capsys.readouterr().out):
        assert 'raise LookupError("no such kernel")' in text
        assert "LookupError: no such kernel" in text
        assert f"done in {tmp_path.name}" in text
        assert sections_of(text) == ["broken", "whole"]


def test_what_does_not_fit_into_the_time_is_said_to_be_skipped(tmp_path, report, monkeypatch):
    asked = []
    sections = {
        name: Section(lambda bench: asked.append(bench.left), least, 20) for name, least in (("a", 9), ("b", 70))
    }
    for section in sections.values():
        section.text.__doc__ = "A section."
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    assert not run(["a", "b"], bench=bench(tmp_path, seconds=60, device="cuda"), report=report)
    assert len(asked) == 1
    assert asked[0] == pytest.approx(20, abs=1), "and no section takes the time of all"
    assert "Skipped: 60 s are left, and it needs some 70" in report.sections["b"]


def test_a_chosen_section_replaces_its_own_and_an_unknown_one_is_answered_with_all(tmp_path, monkeypatch, capsys):
    out = tmp_path / "toy.md"
    out.write_text("# On a GPU\n\n## versions\n\nstale\n\n## decode\n\n### kept\n\n## gone\n\nfrom before\n")
    command = ["gpu.py", "--folder", str(tmp_path / "disk"), "--out", str(out), "--minutes", "5", "--only"]
    monkeypatch.setattr(sys, "argv", [*command, "versions"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 0, out.read_text()
    text = out.read_text()
    assert sections_of(text) == ["versions", "decode"]
    assert "stale" not in text
    assert "`python -m benchmarks.gpu --minutes 5 --only versions`" in text
    assert "### kept" in text
    assert "| transformers |" in text
    assert not list((tmp_path / "disk").iterdir())
    monkeypatch.setattr(sys, "argv", [*command, "speed"])
    with pytest.raises(SystemExit):
        gpu.main()
    error = capsys.readouterr().err
    assert "invalid choice: 'speed'" in error
    assert all(name in error for name in SECTIONS)


def test_what_a_cpu_did_does_not_pass_for_what_a_gpu_did(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(gpu.RESULT)])
    before = gpu.RESULT.read_text() if gpu.RESULT.exists() else None
    with pytest.raises(SystemExit, match="that file is for what a GPU did"):
        gpu.main()
    assert before == (gpu.RESULT.read_text() if gpu.RESULT.exists() else None)


def fail(reason):
    raise ArithmeticError(reason)


def test_a_process_that_fails_or_takes_too_long_costs_its_own_result_only(tmp_path):
    alone = bench(tmp_path, isolated=True)
    failed = alone.attempt(lambda: alone.call(fail, reason="device-side assert"))
    assert "tests.benchmarks.test_gpu.fail ended with 1" in failed.error
    assert "in fail" in failed.error
    assert failed.reason == "failed: ArithmeticError: device-side assert"
    short = bench(tmp_path, seconds=1)
    tried = short.together({"long": lambda: short.run([sys.executable, "-c", "import time; time.sleep(600)"])})
    assert tried["long"].reason.startswith("failed: -c was stopped after ")


def test_differences_of_losses():
    """2 of 4 and 0.1 of 0.5: relative above 1, absolute below."""
    assert difference([4.0, 6.0], [4.0, 4.0]) == 0.5
    assert difference([0.6], [0.5]) == pytest.approx(0.1)
    assert math.isnan(difference([1.0], [1.0, 2.0]))
    assert math.isnan(difference([1.0, math.nan], [1.0, 2.0]))
    assert (verdict([0.0, 0.1], 0.1), verdict([0.2], 0.1), verdict([math.nan], 0.1)) == ("yes", "NO", "NO")


def test_a_step_of_decoding_reads_the_weights_without_the_embedding_and_the_keys_and_values():
    """One layer, width 8, 2 of 4 heads for keys, 16 tokens: 64 + 32 + 32 + 64 + 3 x 8 x 12 + 3 x 8 + 16 x 8 weights."""
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 16}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    assert read_bytes(model) == 4 * (64 + 32 + 32 + 64 + 3 * 8 * 12 + 3 * 8 + 16 * 8)
    assert cache_bytes(model, 5) == 4 * 2 * 5 * 2 * 2
    config.tie_word_embeddings = True
    assert read_bytes(LlamaForCausalLM(config)) == read_bytes(model), "the head is read all the same"


def test_operations_of_a_token_at_seven_billion():
    """7.615 less 0.545 billion weights, 28 layers of width 3584, 2,048 tokens: 42.4 + 1.2 billion operations."""
    parameters = sum(parameter.numel() for parameter in causal_lm_module(SHAPES["7B"]).parameters())
    assert parameters == 7_615_616_512, "Qwen2.5-7B's"
    assert flops_of_token(SHAPES["7B"], parameters, length=2048) == pytest.approx(43.65e9, rel=1e-3)
