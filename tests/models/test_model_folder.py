"""Finding a model on disk and reading rows of its tensors."""

import json
import resource
import struct

import pytest
import torch
from safetensors.torch import save_file

from rlhf.models.model_folder import ModelFolder, local_folder
from tests.models import tiny


def test_rows_are_read_without_the_rest_of_the_tensor(tmp_path):
    shape, wanted = [2**19, 1024], 300_000  # 2 GiB of holes that take no disk
    header = json.dumps({"big": {"dtype": "F32", "shape": shape, "data_offsets": [0, 2**31]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(8 + len(header) + wanted * 4096)
        file.write(struct.pack("<f", 7.0) * 1024)
        file.truncate(8 + len(header) + 2**31)
    checkpoint = ModelFolder(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = checkpoint.read("big", slice(wanted - 1, wanted + 1)).clone()
    assert torch.equal(rows, torch.tensor([[0.0], [7.0]]).expand(2, 1024))
    assert checkpoint.shape("big") == (2**19, 1024)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_matrices_vectors_scalars_and_empty_ranges_are_served(tmp_path):
    matrix, vector = torch.arange(12.0).view(4, 3), torch.arange(5.0)
    save_file({"m": matrix, "v": vector, "s": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    checkpoint = ModelFolder(tmp_path)
    assert torch.equal(checkpoint.read("m", slice(1, 3)), matrix[1:3])
    assert torch.equal(checkpoint.read("v", slice(3, 5)), vector[3:])
    assert checkpoint.read("m", slice(4, 4)).shape == (0, 3)
    assert checkpoint.read("s", slice(0, 1)) == 3.0
    assert "m" in checkpoint
    assert "n" not in checkpoint


def test_shards_are_found_through_their_index(tmp_path):
    model = tiny.model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    checkpoint = ModelFolder(tmp_path)
    assert set(checkpoint.keys()) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(checkpoint.read(name, slice(None)), value)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=gone.name):
        ModelFolder(tmp_path)


def test_a_folder_with_pickles_only_is_refused_unopened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ValueError, match=r"\.bin.*never opened.*save_pretrained"):
        ModelFolder(tmp_path)


def test_an_adapter_and_an_empty_folder_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="holds no weights: expected `model.safetensors`"):
        ModelFolder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge_and_unload"):
        ModelFolder(tmp_path)


def test_a_folder_is_itself_and_a_missing_one_is_named(tmp_path):
    assert local_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match=r"no_such.*no such folder.*hub id such as"):
        local_folder(str(tmp_path / "no_such"))


def test_a_hub_id_without_network_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"nobody/nothing.*the hub gave none.*network"):
        local_folder("nobody/nothing")
