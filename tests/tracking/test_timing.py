"""Phases add up; peaks belong to the phases that are open; mapped files are no memory of ours."""

import mmap
import re
import time
from pathlib import Path

import pytest
import torch

from rlhf.runtime.dist import World
from rlhf.tracking import timing
from rlhf.tracking.metric_registry import check
from rlhf.tracking.timing import (
    Peak,
    PeakMeter,
    Stopwatch,
    memory_metrics,
    resident,
    seconds_by_rank,
    throughput,
)

CPU = torch.device("cpu")
MB = 2**20


def test_a_phase_adds_up_and_is_taken_once():
    timer = Stopwatch(CPU)
    started = time.perf_counter()
    with timer("step"):
        for _ in range(2):
            with timer("generate"):
                time.sleep(0.02)
        with timer("train"):
            time.sleep(0.01)
    elapsed = time.perf_counter() - started
    taken = timer.take()
    check("ppo", list(taken))
    assert {name for name in taken if name.startswith("timing_s/")} == {
        "timing_s/step",
        "timing_s/generate",
        "timing_s/train",
    }
    assert taken["timing_s/generate"] >= 0.04
    assert taken["timing_s/train"] >= 0.01
    assert taken["timing_s/generate"] + taken["timing_s/train"] <= taken["timing_s/step"] <= elapsed
    assert timer.take() == {}


def test_a_phase_that_fails_is_timed_too():
    timer = Stopwatch(CPU)

    def failing_phase():
        with timer("score"):
            time.sleep(0.01)
            raise RuntimeError("no score")

    with pytest.raises(RuntimeError, match="no score"):
        failing_phase()
    assert timer.take()["timing_s/score"] >= 0.01


def test_parts_of_a_phase_add_up_within_it_and_have_no_memory_of_their_own():
    timer = Stopwatch(CPU)
    with timer("train"):
        for part in ("actor", "critic", "actor"):
            with timer.part(f"train/{part}"):
                time.sleep(0.01)
    taken = timer.take()
    check("ppo", list(taken))
    parts = taken["timing_s/train/actor"], taken["timing_s/train/critic"]
    assert parts[0] >= 0.02
    assert parts[1] >= 0.01
    assert sum(parts) <= taken["timing_s/train"]
    assert [name for name in taken if name.startswith("memory/")] == ["memory/train_host_bytes"]
    assert timer.take() == {}


class StreamClock:
    """Stands for CUDA events: what is recorded gets its time when the device comes to it, 5 s after it was told to."""

    log: list = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.at, self.is_done = len(self.log) + 1, False
        self.log.append("record")

    def synchronize(self):
        self.is_done = True

    def elapsed_time(self, other):
        assert other.is_done
        return 5000.0 * (other.at - self.at)


def test_a_part_on_a_device_is_timed_by_events_and_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", StreamClock)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("a part waited for the device"))
    timer = Stopwatch(torch.device("cuda"))
    with timer.part("train/actor"):
        pass
    assert StreamClock.log == ["record", "record"]
    assert timer.take() == {"timing_s/train/actor": 5.0}


def test_throughput_of_a_phase_is_its_tokens_over_the_seconds_of_the_slowest_rank():
    timing = {"timing_s/step": 10.0, "timing_s/evaluate": 3.0, "timing_s/save": 1.0, "timing_s/generate": 2.0}
    tokens = {"step": 60.0, "generate": 20.0, "train": 7.0}
    alone = throughput(tokens, timing, by_rank={})
    assert alone == {"perf/tokens_per_second": 10.0, "perf/tokens_per_second/generate": 10.0}  # 60 / 6, 20 / 2
    by_rank = {"perf/slowest_rank_s/generate": 4.0}
    assert throughput(tokens, timing, by_rank=by_rank)["perf/tokens_per_second/generate"] == 5.0
    check("ppo", list(alone))
    assert throughput({}, timing, by_rank={}) == {}


def test_the_fastest_and_the_slowest_rank_are_known_in_each_phase(monkeypatch):
    mine, other = {"timing_s/b": 2.0, "timing_s/a/x": 4.0, "memory/b_host_bytes": 9.0}, [7.0, 1.0]  # of a/x and b

    def max_over_ranks(x):
        theirs = torch.tensor([*other, *(-value for value in other)], dtype=torch.float64)
        return torch.maximum(x, theirs)

    monkeypatch.setattr(timing, "max_over_ranks", max_over_ranks)
    found = seconds_by_rank(mine, World(0, 2, CPU))
    assert found == {
        "perf/slowest_rank_s/a/x": 7.0,
        "perf/fastest_rank_s/a/x": 4.0,
        "perf/slowest_rank_s/b": 2.0,
        "perf/fastest_rank_s/b": 1.0,
    }
    check("ppo", list(found))
    assert seconds_by_rank(mine, World.alone()) == {}


def test_resident_memory_is_what_the_kernel_says_and_grows_with_a_tensor():
    status = int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    before = memory_metrics(CPU)
    check("sft", list(before))
    assert set(before) == {"memory/rss_bytes"}
    assert before["memory/rss_bytes"] == pytest.approx(status, abs=8 * 2**20)
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    grown = memory_metrics(CPU)["memory/rss_bytes"] - before["memory/rss_bytes"]
    assert grown == pytest.approx(held.numel(), abs=8 * 2**20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_phase_on_the_gpu_includes_the_work_it_started():
    device = torch.device("cuda")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    x = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    timer = Stopwatch(device)
    with timer("train"):
        begin.record()
        for _ in range(50):
            x = torch.tanh(x @ x)
        end.record()
    assert timer.take()["timing_s/train"] >= begin.elapsed_time(end) / 1000
    assert memory_metrics(device)["memory/device_bytes"] >= x.numel() * 4


def test_what_is_held_of_a_device_does_not_begin_again_with_each_phase(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3)  # since the last phase ended
    assert memory_metrics(torch.device("cuda"))["memory/device_bytes"] == 7


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
    monkeypatch.setattr(timing, "_CLEAR", Path(tmp_path / "no such folder" / "clear_refs"))
    meter = PeakMeter()
    for _ in range(2):
        meter.begin(CPU)
        assert meter.end(CPU).host > 0
    assert caplog.text.count("since the process began") == 1


def test_a_system_without_proc_has_the_peak_of_the_process(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(timing, "_STATUS", tmp_path / "status")
    meter = PeakMeter()
    meter.begin(CPU)
    assert meter.end(CPU).host > 10 * MB
    assert "has no /proc" in caplog.text


def test_a_system_that_does_not_keep_the_highest_has_the_peak_of_the_process(monkeypatch, caplog, tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nVmSize:\t 900000 kB\nVmRSS:\t 1000 kB\nThreads:\t1\n")
    monkeypatch.setattr(timing, "_STATUS", tmp_path / "status")
    meter = PeakMeter()
    meter.begin(CPU)
    assert meter.end(CPU).host > 10 * MB
    assert "does not tell the highest" in caplog.text


def test_metrics_of_a_peak_are_registered():
    found = Peak(host=3, device=2).metrics("train")
    assert found == {"memory/train_host_bytes": 3, "memory/train_device_bytes": 2}
    check("ppo", list(found))
    assert Peak(host=3).metrics("train") == {"memory/train_host_bytes": 3}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_parts_on_the_gpu_are_charged_for_their_own_kernels():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    timer = Stopwatch(device)
    with timer("train"):
        with timer.part("train/actor"):
            for _ in range(50):
                x = torch.tanh(x @ x)
        with timer.part("train/critic"):  # begins on the CPU long before the device is done with the actor
            x = x + 1
    taken = timer.take()
    assert taken["timing_s/train/actor"] > 5 * taken["timing_s/train/critic"]
    assert taken["timing_s/train/actor"] + taken["timing_s/train/critic"] <= taken["timing_s/train"] * 1.01


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
