"""A run that goes on from a checkpoint is the run that was never stopped, also on another number of ranks."""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from tests.hf.runs import train, zero
from tests.ranks import run_on_ranks

NVME = {"device": "nvme", "nvme_path": tempfile.gettempdir()}
KINDS = {
    "lora": {"deepspeed": zero(2), "model": "lora"},
    "bf16": {"deepspeed": zero(3, bf16={"enabled": True}), "bf16": True},
    "nvme": {"deepspeed": zero(3, zero_optimization={"offload_optimizer": NVME, "offload_param": NVME})},
}
"""What is trained; 4 rows in each step on one rank as on two."""
SAVES = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}


def whole(folder):
    """Runs of each kind without a break; all of them leave a checkpoint in the middle."""
    size = 4 // (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    return {
        name: train(f"{folder}/{name}", **kind, **SAVES, per_device_train_batch_size=size)
        for name, kind in KINDS.items()
    }


def resumed(folder, output):
    """The same from the checkpoints in the middle, also into a model that is sharded already."""
    size = 4 // (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    options = {"per_device_train_batch_size": size, "max_steps": 8}
    return {
        name: train(f"{output}/{name}", **kind, **options, resume=f"{folder}/{name}/checkpoint-4", first=first)
        for (name, kind), first in zip(KINDS.items(), ("evaluate", "train", "evaluate"), strict=True)
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """By number of ranks: the folder, and what came out of each kind."""
    folders = {ranks: tmp_path_factory.mktemp(f"on{ranks}") for ranks in (1, 2)}
    return {ranks: (folder, run_on_ranks(whole, ranks, str(folder))[0]) for ranks, folder in folders.items()}


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_losses_and_weights_go_on(unbroken, before, after, tmp_path):
    folder, expected = unbroken[before]
    found = run_on_ranks(resumed, after, str(folder), str(tmp_path))[0]
    for name, run in found.items():
        exact = before == after
        wanted = expected[name]
        near = {"abs": 0 if exact else 2e-2 if name == "bf16" else 2e-6, "rel": 0}
        assert run["loss"][-4:] == pytest.approx(wanted["loss"][-4:], **near), name
        assert run["learning_rate"][-4:] == wanted["learning_rate"][-4:]
        for key, weight in wanted["weights"].items():
            assert (run["weights"][key] - weight).abs().max() <= (0 if exact else 2e-2 if name == "bf16" else 2e-5), key


def test_the_checkpoint_is_where_the_trainer_keeps_it(unbroken):
    folder, _ = unbroken[2]
    checkpoint = folder / "nvme/checkpoint-4"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 4
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "zero"} <= {file.name for file in checkpoint.iterdir()}
    assert (checkpoint / "zero/step-000004/checkpoint.json").is_file()
    assert (checkpoint / "optimizer.pt").stat().st_size < 10_000  # no state


def best(folder):
    """The loss after training is that of the best checkpoint, not of the last one, on sharded weights."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    options |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}  # the best has the largest loss: the first
    found = {}
    for model in ("llama", "lora"):
        run = train(f"{folder}/{model}", zero(3), model=model, **options)
        state = json.loads(next(Path(folder).glob(f"{model}/checkpoint-4/trainer_state.json")).read_text())
        found[model] = run["eval_loss"], [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_best_model_is_loaded_at_the_end(ranks, tmp_path):
    for final, seen in run_on_ranks(best, ranks, str(tmp_path))[0].values():
        assert len(seen) == 2
        assert final == seen[0] > seen[1]
