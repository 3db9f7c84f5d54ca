"""The benchmark's bookkeeping: what is kept, what is written where, and that its parts run at small sizes."""

import sys
from dataclasses import asdict

import pytest
import torch

from benchmarks import zero_adam, zero_disk, zero_offload, zero_report, zero_run, zero_step
from benchmarks.zero_case import Case, Outcome, run
from benchmarks.zero_growth import parameters
from benchmarks.zero_records import Records


def outcome(cpu, *, peak=100.0, losses=(3.0, 2.0)):
    return Outcome(cpu, 2 * cpu, peak, peak, 0.0, list(losses))


def test_an_outcome_joins_ranks_and_leaves_the_warmup_out():
    first = {"cpu_seconds": [9, 1, 3, 2], "wall_seconds": [9, 1, 2, 3], "losses": [4, 3, 2, 1]}
    second = {"cpu_seconds": [9, 2, 2, 2], "wall_seconds": [9, 4, 1, 1], "losses": [2, 1, 0, 3]}
    first |= {"start_peak": 3e6, "peak": 1e6, "device_peak": 7e6}
    second |= {"start_peak": 5e6, "peak": 2e6, "device_peak": 9e6}
    assert Outcome.of([first, second], warmup=1) == Outcome(4, 3, 4.0, 1.5, 8.0, [3, 2, 1, 2])


def test_records_are_measured_once_and_survive_a_restart(tmp_path):
    asked = []

    def runner(case):
        asked.append(case.contender)
        if case.contender == "deepspeed":
            raise RuntimeError("not on this machine")
        return outcome(0.1)

    for _ in range(2):
        records = Records(tmp_path / "records.jsonl", runner=runner)
        assert records.measure(Case("ours", "1M"), 0) == outcome(0.1)
        assert records.measure(Case("deepspeed", "1M"), 0) is None
    assert asked == ["ours", "deepspeed"]


def test_our_own_failure_is_no_result(tmp_path):
    def runner(case):
        raise RuntimeError("rank 1 ended")

    with pytest.raises(RuntimeError, match="rank 1 ended"):
        Records(tmp_path / "records.jsonl", runner=runner).measure(Case("ours", "1M"), 0)


def test_the_step_table_takes_ratios_within_a_round(tmp_path):
    """Ours costs 100 and 200 ms, DeepSpeed 300 and 200, tuned 150 and 500: ratios 1.5 and 1."""
    costs = {"plain": [0.05, 0.05], "ours": [0.1, 0.2], "deepspeed": [0.3, 0.2], "tuned": [0.15, 0.5]}
    counts = {}

    def runner(case):
        name = "tuned" if case.tuned else case.contender
        key = (name, case.stage)
        counts[key] = counts.get(key, -1) + 1
        return outcome(costs[name][counts[key]], losses=(3.0, 2.5 if name == "deepspeed" else 2.0))

    records = Records(tmp_path / "records.jsonl", runner=runner)
    text = zero_step.compare(records, Case("ours", "1M", ranks=2), rows=["3-nvme"], rounds=2, peer=True)
    assert "1M, 2 ranks, fp32" in text
    assert "| 3-nvme | 150 (100–200) | 250 (200–300) | 325 (150–500) | 1.25 (1.00–1.50) |" in text
    assert "| 0.0e+00 | 5.0e-01 | 0.0e+00 |" in text


def test_the_offload_table_takes_fractions_within_a_round(tmp_path):
    """The device takes 2 and 4 s, the host 4 and 5: fractions 0.5 and 0.8 of its speed, the median 0.65."""
    walls = {"none": [1, 2], "cpu": [2, 2.5]}
    cases = []

    def runner(case):
        cases.append(case)
        return outcome(walls[case.offload_optimizer].pop(0))

    records = Records(tmp_path / "records.jsonl", runner=runner)
    text = zero_offload.compare(records, Case("ours", "1M", sequences=8, length=100), rows=["cpu"], rounds=2)
    assert "| cpu | 4500 (4000–5000) | 0.65 (0.50–0.80) | 180 (160–200) |" in text
    assert [(case.device, case.stage) for case in cases] == [("cuda", 3)] * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to measure")
def test_without_a_device_the_offload_part_says_what_is_missing():
    with pytest.raises(SystemExit, match="found no CUDA device, expected one"):
        zero_offload.require_cuda()


def test_accumulated_micro_batches_cost_the_loss_of_the_whole_step(tmp_path):
    losses = [
        run(Case("ours", "1M", steps=3, sequences=4, length=16, accumulation=parts), folder=tmp_path).losses
        for parts in (1, 4)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][0] != losses[0][1]


def test_a_section_is_replaced_and_others_stay(tmp_path, monkeypatch):
    result = tmp_path / "zero.md"
    monkeypatch.setattr(sys, "argv", ["zero.py", "disk", "--folder", "/mine/x", "--rounds", "1", "--peer=/mine/python"])
    for part, text in (("disk", "old"), ("adam", "### fast\n\nkept"), ("disk", "new")):
        zero_report.write_section(part, text, result=result)
    content = result.read_text()
    assert [line for line in content.splitlines() if line.startswith("## ")] == ["## adam", "## disk"]
    assert "kept" in content
    assert "new" in content
    assert "old" not in content
    assert "`python -m benchmarks.zero disk --rounds 1 --peer PYTHON`" in content


def test_the_disk_part_runs(tmp_path):
    text = zero_disk.compare(tmp_path, nbytes=8 << 20, tile=1 << 20, buffers=3, rounds=1)
    assert "| write | " in text


def test_the_adam_part_runs_and_all_contenders_agree():
    seconds = zero_adam.measure(4 * 64 * 10, 1)
    assert {"in-place pass", "fp32, ours", "bf16, ours", "bf16, torch fused + 2 passes"} <= seconds.keys()


def test_all_contenders_start_from_the_same_weights():
    case = asdict(Case("plain", "1M"))
    model = zero_run.filled_llama(case)
    weights = zero_run.RandomWeights(model)
    for name, parameter in model.named_parameters():
        assert weights.read(name, slice(1, 5)).equal(parameter[1:5])


def test_sizes_are_what_their_names_say():
    for size in ("25M", "60M", "125M", "250M", "500M"):
        assert parameters(size) == pytest.approx(float(size[:-1]) * 1e6, rel=0.1), size
