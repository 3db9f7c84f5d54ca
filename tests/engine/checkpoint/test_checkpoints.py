"""Checkpoints on one rank: what is on the disk, what counts, and what happens when something is wrong with it."""

import json
import random
import shutil
import subprocess
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf.engine.checkpoint.checkpoint_files import BLOCK
from rlhf.engine.checkpoint.checkpoint_state import CheckpointTensor
from rlhf.engine.checkpoint.checkpoints import Checkpoints, steps_in
from rlhf.runtime import dist
from rlhf.runtime.errors import RunError

WORLD = dist.World.alone()


def checkpoints(folder, *, keep=2, asynchronous=False):
    return Checkpoints(folder, WORLD, keep=keep, asynchronous=asynchronous)


def stored(key, tensor, *, rows=None, shape=None):
    shape = shape or tuple(tensor.shape)
    rows = rows or range(shape[0] if shape else 1)
    return CheckpointTensor(key, shape, rows, tensor.dtype, True, read=lambda: tensor, write=tensor.copy_)


def save(there, step, tensors, *, protected=frozenset(), **state):
    there.save(step, [stored(key, tensor) for key, tensor in tensors.items()], state=state, protected=set(protected))
    there.finish_save()


def load(there, tensors):
    saved = there.newest()
    there.load(saved, [stored(key, tensor) for key, tensor in tensors.items()])
    return saved


def some():
    generator = torch.Generator().manual_seed(5)
    return {
        "matrix": torch.randn(7, 5, generator=generator),
        "half": torch.randn(3, 3, generator=generator).bfloat16(),
        "scalar": torch.tensor(4.25),
        "large": torch.randn(3, BLOCK // 4, generator=generator),
        "empty": torch.empty(0, 4),
    }


def blank(tensors):
    return {key: torch.full_like(tensor, 9) for key, tensor in tensors.items()}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_was_saved_is_what_is_loaded_bit_for_bit(tmp_path, asynchronous):
    there, tensors = checkpoints(tmp_path, asynchronous=asynchronous), some()
    save(there, 120, tensors, note="a", losses=[float("nan"), 0.1])
    found = blank(tensors)
    saved = load(there, found)
    assert (saved.step, saved.folder.name, saved.state["note"]) == (120, "step-000120", "a")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_the_files_are_safetensors_and_one_json(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2**40]), "half": torch.ones(3).bfloat16()}
    save(checkpoints(tmp_path), 3, tensors)
    folder = tmp_path / "step-000003"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", "rank-00000.safetensors"]
    found = load_file(folder / "rank-00000.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in tensors.items())
    index = json.loads((folder / "checkpoint.json").read_text())["content"]["tensors"]
    assert index["b"]["shards"][0] | {"start": 0, "checksums": []} == {
        "rank": 0,
        "rows": [0, 2],
        "start": 0,
        "checksums": [],
    }


def test_random_numbers_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), np.random.normal(), np.random.rand(), torch.rand(()).item()

    np.random.normal()  # the second of a pair is kept for later
    save(checkpoints(tmp_path), 1, {})
    expected = [draw() for _ in range(3)]
    load(checkpoints(tmp_path), {})
    assert [draw() for _ in range(3)] == expected


def test_training_may_change_what_is_being_saved(tmp_path):
    there, tensors = checkpoints(tmp_path, asynchronous=True), some()
    expected = {key: tensor.clone() for key, tensor in tensors.items()}
    there.save(1, [stored(key, tensor) for key, tensor in tensors.items()], state={}, protected=set())
    for tensor in tensors.values():
        tensor.zero_()
    assert steps_in(tmp_path) == []
    there.finish_save()
    found = blank(tensors)
    load(there, found)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("rows", [range(9), range(3, 7), range(8, 9), range(2)])
def test_any_rows_of_a_tensor_can_be_read(tmp_path, rows):
    whole = torch.arange(63.0).reshape(9, 7)
    there = checkpoints(tmp_path)
    save(there, 1, {"x": whole})
    found = torch.full((len(rows), 7), -1.0)
    there.load(there.newest(), [stored("x", found, rows=rows, shape=(9, 7))])
    assert torch.equal(found, whole[rows.start : rows.stop])


def test_rows_behind_the_first_block_are_read_without_it(tmp_path):
    whole = torch.arange(BLOCK // 2).reshape(-1, 8).float()  # two blocks
    there = checkpoints(tmp_path)
    save(there, 1, {"x": whole})
    file = tmp_path / "step-000001/rank-00000.safetensors"
    flip(file, file.stat().st_size - whole.nbytes + 5)
    found, rows = torch.zeros(3, 8), range(len(whole) - 3, len(whole))
    there.load(there.newest(), [stored("x", found, rows=rows, shape=tuple(whole.shape))])
    assert torch.equal(found, whole[-3:])


def test_what_rests_on_disk_is_in_memory_one_tensor_at_a_time(tmp_path):
    alive, most = [], []

    def read():
        tensor = torch.ones(1000)
        alive.append(weakref.ref(tensor))
        most.append(sum(ref() is not None for ref in alive))
        return tensor

    def write(tensor):
        alive.append(weakref.ref(tensor))
        most.append(sum(ref() is not None for ref in alive))

    there = checkpoints(tmp_path, asynchronous=True)
    tensors = [
        CheckpointTensor(f"{n}", (1000,), range(1000), torch.float32, in_memory=False, read=read, write=write)
        for n in range(9)
    ]
    there.save(1, tensors, state={}, protected=set())
    there.finish_save()
    there.load(there.newest(), tensors)
    assert len(most) == 18
    assert max(most) <= 2  # the one before is dropped when the next one is there


def test_the_newest_and_the_protected_are_kept(tmp_path):
    there = checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30, 40, 50):
        save(there, step, {"x": torch.ones(2)}, protected={20})
    assert steps_in(tmp_path) == [20, 40, 50]
    there.remove()
    assert not tmp_path.exists()


def test_a_half_written_checkpoint_is_never_read_and_goes_away(tmp_path):
    there = checkpoints(tmp_path)
    save(there, 1, {"x": torch.ones(2)})
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000002.partial")
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000003.removed")
    (tmp_path / "notes").mkdir()
    assert there.newest().step == 1
    there.remove_unfinished()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-000001"]


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize("position", [0, 200, BLOCK + 300, -1])
def test_a_flipped_bit_is_an_error_and_not_garbage(tmp_path, position):
    there, tensors = checkpoints(tmp_path), some()
    save(there, 1, tensors)
    file = tmp_path / "step-000001/rank-00000.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")  # which we do not read
    flip(file, position + header if position >= 0 else position)
    with pytest.raises(
        ValueError, match=r"step-000001 cannot be used: .*rank-00000\.safetensors is damaged: bytes \d+ to"
    ):
        load(there, blank(tensors))


def test_a_file_that_ends_early_or_is_gone_is_an_error(tmp_path):
    there, tensors = checkpoints(tmp_path), some()
    save(there, 1, tensors)
    file = tmp_path / "step-000001/rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"ends at byte \d+; expected at least \d+\. Remove that folder"):
        there.newest()
    file.unlink()
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors is missing\. Remove that folder"):
        there.newest()


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "other"])
def test_a_damaged_table_of_contents_is_an_error(tmp_path, damage):
    there = checkpoints(tmp_path)
    save(there, 1, {"x": torch.ones(2)}, steps=37)
    file = tmp_path / "step-000001/checkpoint.json"
    text = file.read_text()
    changes = {"cut": text[:-20], "changed": text.replace('"steps": 37', '"steps": 38'), "other": '{"format": 99}'}
    file.unlink()
    if damage != "gone":
        file.write_text(changes[damage])
    with pytest.raises(ValueError, match=r"step-000001 cannot be used: .*checkpoint\.json .*Remove that folder"):
        there.newest()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    there = checkpoints(tmp_path)
    save(there, 1, {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(4)})
    other = {"a": torch.ones(5), "b": torch.ones(3).half(), "d": torch.ones(1)}
    with pytest.raises(
        ValueError, match=r"a was \[2\], is \[5\]; b was float32, is float16; c is not trained here and 1 "
    ):
        load(there, other)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_stops_the_run_and_keeps_the_older_checkpoint(tmp_path, asynchronous):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can make a small file system")
    try:
        there = checkpoints(tmp_path / "some", asynchronous=asynchronous)
        old = {"x": torch.arange(50_000.0)}
        save(there, 1, old)
        with pytest.raises(RuntimeError, match=r"of step 2 could not be written: .*No space.*step-000001 is unchanged"):
            save(there, 2, {"x": torch.zeros(500_000)})
        assert [path.name for path in (tmp_path / "some").iterdir()] == ["step-000001"]
        found = {"x": torch.zeros(50_000)}
        load(there, found)
        assert torch.equal(found["x"], old["x"])
        save(there, 3, old)  # and there is room again
        assert steps_in(tmp_path / "some") == [1, 3]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_without_room_is_refused_before_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"found .* GB free, expected 3000.00 GB for checkpoints \(3 x 1000.00 GB"):
        checkpoints(tmp_path / "later").check_space(10**12, count=3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_checkpoint_whose_thread_has_crashed_never_counts(tmp_path, monkeypatch):
    there = checkpoints(tmp_path, asynchronous=True)
    monkeypatch.setattr("rlhf.engine.checkpoint.checkpoint_files.zlib.crc32", lambda data: 1 / 0)
    there.save(1, [stored("x", torch.ones(3)), stored("y", torch.ones(3))], state={}, protected=set())
    with pytest.raises(RunError, match="could not be written: .*rank-00000.safetensors: 2 tensors were not written"):
        there.finish_save()
    assert steps_in(tmp_path) == []


def test_closing_gives_up_what_does_not_count_yet(tmp_path):
    there = checkpoints(tmp_path, asynchronous=True)
    there.save(1, [stored("x", torch.ones(3, BLOCK))], state={}, protected=set())
    there.close()
    assert not there.is_busy
    assert steps_in(tmp_path) == []
