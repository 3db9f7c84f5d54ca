"""Phases add up, and memory readings are those of this process."""

import re
import time
from pathlib import Path

import pytest
import torch

from rlhf.tracking.metric_registry import check
from rlhf.tracking.timing import Stopwatch, memory_metrics

CPU = torch.device("cpu")


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
