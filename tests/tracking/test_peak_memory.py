"""Peaks belong to the phases that are open, and files that are mapped are no memory of ours."""

import mmap
from pathlib import Path

import pytest
import torch

from rlhf.tracking import peak_memory as memory
from rlhf.tracking.metric_registry import check
from rlhf.tracking.peak_memory import Peak, PeakMeter, peak_metrics, resident

CPU = torch.device("cpu")
MB = 2**20


def hold(megabytes):
    return torch.ones(megabytes * MB, dtype=torch.uint8)


def test_a_peak_belongs_to_every_phase_that_is_open_and_to_no_later_one():
    meter = PeakMeter()
    start = resident()["RssAnon"]
    meter.begin(CPU)
    meter.begin(CPU)
    del_me = hold(64)
    del del_me
    inner = meter.end(CPU)
    meter.begin(CPU)
    later = meter.end(CPU)
    outer = meter.end(CPU)
    assert inner.host - start >= 60 * MB
    assert outer.host == max(inner.host, later.host)
    assert later.host < inner.host - 50 * MB


def test_pages_of_a_mapped_file_are_left_out(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(64 * MB))
    meter = PeakMeter()
    start = resident()["RssAnon"]
    meter.begin(CPU)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[at] for at in range(0, 64 * MB, 4096)) == 0
        assert resident()["RssFile"] >= 64 * MB
        peak = meter.end(CPU)
    assert peak.host - start < 20 * MB


def test_a_system_that_cannot_start_again_says_so_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", Path(tmp_path / "no such folder" / "clear_refs"))
    meter = PeakMeter()
    for _ in range(2):
        meter.begin(CPU)
        assert meter.end(CPU).host > 0
    assert caplog.text.count("since the process began") == 1


def test_a_system_without_proc_has_the_peak_of_the_process(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    meter = PeakMeter()
    meter.begin(CPU)
    assert meter.end(CPU).host > 10 * MB
    assert "has no /proc" in caplog.text


def test_a_system_that_does_not_keep_the_highest_has_the_peak_of_the_process(monkeypatch, caplog, tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nVmSize:\t 900000 kB\nVmRSS:\t 1000 kB\nThreads:\t1\n")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    meter = PeakMeter()
    meter.begin(CPU)
    assert meter.end(CPU).host > 10 * MB
    assert "does not tell the highest" in caplog.text


def test_metrics_of_a_peak_are_registered():
    found = peak_metrics("train", Peak(host=3, device=2))
    assert found == {"memory/train_host_bytes": 3, "memory/train_device_bytes": 2}
    check("ppo", list(found))
    assert peak_metrics("train", Peak(host=3)) == {"memory/train_host_bytes": 3}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_peak_of_a_device_starts_again_with_each_phase():
    device, meter = torch.device("cuda"), PeakMeter()
    meter.begin(device)
    held = torch.empty(64 * MB, dtype=torch.uint8, device=device)
    first = meter.end(device)
    del held
    meter.begin(device)
    assert meter.end(device).device <= first.device - 64 * MB
