"""A Llama of a few thousand parameters whose sizes divide by nothing, its weights in memory, and data for it."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.engine import build_engine
from rlhf.models.model_spec import ModelSpec

VOCAB, LENGTH, SEQUENCES = 101, 10, 8


class Recorded:
    """Weights in memory that remember what was asked of them."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.reads = []

    def read(self, name, rows):
        part = self.tensors[name][rows]
        self.reads.append((name, part.numel()))
        return part


class WithOddParameters(nn.Module):
    """The Llama with a parameter of one row, and one that no loss ever reaches."""

    def __init__(self, llama):
        super().__init__()
        self.llama = llama
        self.gain = nn.Parameter(torch.ones(1))
        self.spare = nn.Parameter(torch.ones(3, 5))

    def forward(self, input_ids):
        return self.llama(input_ids=input_ids).logits * self.gain


class Plain(nn.Module):
    """The Llama, from ids to logits."""

    def __init__(self, llama):
        super().__init__()
        self.llama = llama

    def forward(self, input_ids):
        return self.llama(input_ids=input_ids).logits


def reference(tied=False, odd=False, layers=3, scale=1):
    """The model as transformers makes it, fp32, always the same random weights; `scale` times as wide."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32 * scale,
        intermediate_size=71 * scale,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2 / scale**0.5,
        attn_implementation="eager",
    )
    return (WithOddParameters if odd else Plain)(LlamaForCausalLM(config))


def spec(learns=lambda name: True, **kind):
    """The same model on meta, and its weights."""
    model = reference(**kind)
    weights = Recorded({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    buffers = dict(model.named_buffers())
    model.to("meta")
    for name, buffer in buffers.items():
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, buffer)
    if model.llama.config.tie_word_embeddings:
        model.llama.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name))
    return ModelSpec(
        module=model,
        weights=weights,
        blocks=list(model.llama.model.layers),
        trainable={name for name in weights.tensors if learns(name)},
        config=model.llama.config,
    )


def optimizer_config(**changes):
    settings = {"lr": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "schedule": "linear", "warmup_steps": 2}
    return OptimizerConfig(**(settings | changes))


def engine(world, stage, *, learns=lambda name: True, optimizer=None, precision="fp32", kind=None, **config):
    """A trainable engine on the tiny model."""
    return build_engine(
        spec(learns, **(kind or {})),
        config=EngineConfig(zero_stage=stage, precision=precision, **config),
        world=world,
        optimizer=optimizer or optimizer_config(),
        total_steps=10,
    )


def batch(step):
    """The global batch of a step: `[B, T]` ids, and the `[B, T - 1]` positions that count, few in some sequences."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(VOCAB, (SEQUENCES, LENGTH), generator=generator)
    counts = torch.rand(SEQUENCES, LENGTH - 1, generator=generator) < torch.linspace(0.1, 1, SEQUENCES)[:, None]
    return ids, counts


def token_loss(logits, ids, counts, denominator):
    """Cross-entropy of the counted tokens over the global number of them."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return (losses * counts.flatten()).sum() / denominator


def train_step(trained, step, *, accumulation=2, spoil=False):
    """One step on this rank's share of the global batch; returns its local loss and the step's result."""
    ids, counts = batch(step)
    world = trained.world
    mine = slice(world.rank * SEQUENCES // world.size, (world.rank + 1) * SEQUENCES // world.size)
    micro = list(zip(ids[mine].chunk(accumulation), counts[mine].chunk(accumulation), strict=True))
    total = 0.0
    for index, (rows, counted) in enumerate(micro):
        rows, counted = rows.to(world.device), counted.to(world.device)
        loss = token_loss(trained(rows), rows, counted, counts.sum())
        total += loss.item()
        trained.backward(loss * float("nan") if spoil else loss, last=index == len(micro) - 1)
    return total, trained.step()
