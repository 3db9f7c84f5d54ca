"""The PPO update on real engines: the first minibatch changes nothing by itself, and sizes do not change gradients."""

import pytest
import torch

from rlhf.config.groups import EngineConfig, LoraConfig, OptimizerConfig
from rlhf.config.stages import KLConfig, PPOConfig, SamplingConfig
from rlhf.dist import World
from rlhf.types import PPOBatch
from stages.improve import minibatches, share_of


def config(**changes):
    settings = {
        "engine": EngineConfig(zero_stage=0),
        "lora": LoraConfig(rank=0),
        "micro_batch_size": 2,
        "max_prompt_tokens": 8,
        "max_response_tokens": 4,
        "seed": 0,
        "actor": "actor",
        "reward": "reward",
        "iterations": 1,
        "rollout_size": 8,
        "rollout_micro_batch_size": 4,
        "minibatch_size": 4,
        "actor_optimizer": OptimizerConfig(lr=1e-3),
        "critic_optimizer": OptimizerConfig(lr=1e-3),
        "sampling": SamplingConfig(),
        "kl": KLConfig(),
    }
    return PPOConfig(**(settings | changes))


def batch(num_rows=8, num_prompt=3, num_response=4):
    lengths = torch.tensor([1 + row % num_response for row in range(num_rows)])
    response_mask = torch.arange(num_response) < lengths[:, None]
    prompt_mask = torch.ones(num_rows, num_prompt, dtype=torch.bool)
    prompt_mask[:, 0] = False
    zeros = torch.zeros(num_rows, num_response)
    return PPOBatch(
        sequences=torch.arange(num_rows * (num_prompt + num_response)).view(num_rows, -1),
        attention_mask=torch.cat([prompt_mask, response_mask], dim=1),
        response_mask=response_mask,
        logprobs=zeros,
        values=zeros,
        advantages=zeros,
        returns=zeros,
    )


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own():
    first = [set(m.sequences[:, 0].tolist()) for m in minibatches(batch(), config(), seed=1)]
    again = [set(m.sequences[:, 0].tolist()) for m in minibatches(batch(), config(), seed=1)]
    other = [set(m.sequences[:, 0].tolist()) for m in minibatches(batch(), config(), seed=2)]
    assert set().union(*first) == set(batch().sequences[:, 0].tolist())
    assert first == again
    assert first != other


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_share_a_minibatch_equally_and_completely(size):
    minibatch = batch(num_rows=4)
    shares = [
        share_of(minibatch, config(), world=World(rank=rank, size=size, local_rank=rank, device=torch.device("cpu")))
        for rank in range(size)
    ]
    assert len({len(share) for share in shares}) == 1
    tokens = sum(int(micro.response_mask.sum()) for share in shares for micro in share)
    assert tokens == int(minibatch.response_mask.sum()) == 1 + 2 + 3 + 4


def test_trimming_drops_only_columns_that_are_padding_everywhere():
    short = batch(num_rows=2)  # responses of 1 and 2 tokens, prompts of 2 with one column of padding in front
    trimmed = short.trimmed()
    assert trimmed.response_mask.tolist() == [[True, False], [True, True]]
    assert trimmed.sequences.tolist() == [[1, 2, 3, 4], [8, 9, 10, 11]]
    assert trimmed.attention_mask.tolist() == [[True, True, True, False], [True, True, True, True]]
