"""Adapters on FSDP2 parameters, sharded and gathered, on two ranks."""

import torch
from torch.distributed.fsdp import fully_shard

from rlhf.config.stage_configs import LoraConfig
from rlhf.models.causal_lm import causal_lm
from rlhf.models.model_spec import find_blocks
from rlhf.runtime import dist
from tests.models import tiny
from tests.ranks import run_on_ranks


def whole_model(folder):
    module = tiny.materialized(causal_lm(folder, lora=LoraConfig(rank=3, alpha=6.0)), dtype=torch.bfloat16)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 5e-4)
    return module


def logits(module):
    ids, mask = tiny.padded([5, 9], side="right")
    with torch.no_grad():
        return module(input_ids=ids, attention_mask=mask).logits


def sharded_and_gathered(folder):
    module = whole_model(folder)
    mesh = dist.device_mesh(dist.World(0, 2, torch.device("cpu")))
    parts = [module, *find_blocks(module, 3)]
    for part in reversed(parts):
        fully_shard(part, mesh=mesh)
    found = [logits(module)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    return [*found, logits(module)]


def test_small_adapters_are_the_same_function_sharded_gathered_and_whole(tmp_path):
    expected = logits(whole_model(tiny.save("llama", tmp_path)))
    for sharded, gathered in run_on_ranks(sharded_and_gathered, 2, tmp_path):
        assert torch.equal(sharded, expected)
        assert torch.equal(gathered, expected)
