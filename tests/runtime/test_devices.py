"""Which device a rank gets, and who is told that there is none for it."""

import pytest
import torch

from rlhf.runtime import dist
from stages.setup.preflight import preflight
from tests.memory_plan.test_planner import run_of


@pytest.fixture
def devices(monkeypatch):
    """`devices(2)`: this machine has so many."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def have(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    chosen = []
    have.chosen = chosen
    return have


def test_a_rank_takes_the_device_of_its_number(devices, monkeypatch):
    devices(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dist.start("auto").device == torch.device("cuda", 1)
    assert devices.chosen == [torch.device("cuda", 1)]
    assert dist.start("cpu").device == torch.device("cpu")


def test_more_ranks_than_devices_are_told_before_anything_is_done(devices, monkeypatch, tmp_path):
    devices(1)
    dist.check_devices("auto", ranks=1)
    dist.check_devices("cpu", ranks=2)
    run = run_of(tmp_path)
    message = r"launch\.ranks: found 2 ranks and 1 CUDA device\(s\).*start 1 .*engine\.device=cpu"
    with pytest.raises(ValueError, match=message):
        preflight(run, ranks=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=message):
        dist.start("cuda")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        dist.start("auto")


def test_a_machine_without_a_device_computes_on_its_processors_unless_asked_for_one(devices):
    devices(0)
    assert dist.start("auto").device == torch.device("cpu")
    dist.check_devices("auto", ranks=8)
    with pytest.raises(ValueError, match=r"engine\.device=cuda: this machine has no usable CUDA device"):
        dist.start("cuda")
