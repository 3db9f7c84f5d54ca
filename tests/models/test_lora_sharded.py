"""Merged adapters over gathered FSDP2 parameters, on two ranks."""

import torch
from torch.distributed.fsdp import fully_shard

from rlhf import dist
from rlhf.config import LoraConfig
from rlhf.models.causal_lm import causal_lm
from rlhf.models.lora import adapted_layers, merged
from rlhf.models.surgery import find_blocks
from tests.models import tiny
from tests.ranks import run_on_ranks


def whole_model(folder):
    module = tiny.materialized(causal_lm(folder, lora=LoraConfig(rank=3, alpha=6.0)))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.2)
    return module


def merged_logits(module):
    ids, mask = tiny.padded([5, 9], side="right")
    with torch.no_grad(), merged(module):
        return module(input_ids=ids, attention_mask=mask).logits


def gathered(folder):
    module = whole_model(folder)
    mesh = dist.device_mesh(dist.World(0, 2, 0, torch.device("cpu")))
    for part in [*find_blocks(module, 3), module]:
        fully_shard(part, mesh=mesh)
    before = [parameter.to_local().clone() for parameter in module.parameters()]
    parts = [module, *find_blocks(module, 3)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    logits = merged_logits(module)
    for part in parts:
        part.reshard()
    after = [parameter.to_local() for parameter in module.parameters()]
    names = [name for name, _ in module.named_parameters()]
    equal = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return logits, equal, names, len(adapted_layers(module))


def test_merging_gathered_parameters_is_merging_whole_ones_and_the_shards_stay(tmp_path):
    module = whole_model(tiny.save("llama", tmp_path))
    expected = merged_logits(module)
    for logits, shards_are_equal, names, layers in run_on_ranks(gathered, 2, tmp_path):
        assert torch.equal(logits, expected)
        assert shards_are_equal
        assert names == [name for name, _ in module.named_parameters()]
        assert layers == 21
