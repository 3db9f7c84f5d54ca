"""What the models of a stage compute, on batches of the largest size without values: the stage's own code.

Sequences are as long as the configuration allows, and one of them is shorter, so that there is a mask.
Left out: what it takes (`rlhf/memory_plan/phases.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.algorithms.sft import sft_loss
from rlhf.config.bounds import as_plain
from rlhf.config.ppo_config import PPOConfig
from rlhf.config.stage_configs import RewardConfig, StageConfig
from rlhf.evaluation.metrics import logits_of
from rlhf.generation.generate import Decoding, generate
from rlhf.memory_plan.trace import EnoughError
from rlhf.rollout import Models, critic_values, response_statistics
from rlhf.runtime.dist import World
from rlhf.training.ppo_update import policy_gradient, value_gradient
from rlhf.training.supervised_step import Pairwise
from rlhf.types import PPOBatch, PreferenceBatch, PromptBatch, Responses, SFTBatch


@dataclass(frozen=True)
class Work:
    """A computation on a batch of `rows`; two are equal when they take the same memory."""

    rows: int
    num_prompt: int
    num_response: int

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.num_prompt + self.num_response

    def __call__(self, model: nn.Module) -> Tensor | None:
        """Run it; what is returned is to be run backward."""
        raise NotImplementedError


class Demonstrations(Work):
    """The loss of supervised fine-tuning."""

    def __call__(self, model: nn.Module) -> Tensor:
        """On demonstrations of which every token is learnt."""
        mask = _mask(self.rows, self.length)
        batch = SFTBatch(input_ids=mask.long(), attention_mask=mask, target_mask=mask)
        return sft_loss(logits_of(model, batch), batch.input_ids, mask, denominator=1.0).loss


@dataclass(frozen=True)
class Preferences(Work):
    """The loss of reward modelling."""

    config: RewardConfig = field(compare=False, kw_only=True)

    def __call__(self, model: Any) -> Tensor:
        """On pairs."""
        mask = _mask(2 * self.rows, self.length)
        batch = PreferenceBatch(input_ids=mask.long(), attention_mask=mask, margin=torch.zeros(self.rows))
        return Pairwise(self.config).outcome(model, batch, denominator=torch.ones(())).loss


@dataclass(frozen=True)
class _OfPPO(Work):
    """Something that PPO does with a model."""

    config: PPOConfig = field(compare=False, kw_only=True)
    settings: str = field(default="", kw_only=True)
    """All of them but sizes and engines: what decides which terms a loss has."""


class Statistics(_OfPPO):
    """Log-probabilities and entropies of responses: actor and reference."""

    def __call__(self, model: Any) -> None:
        """Without gradients."""
        response_statistics(model, self._responses(), temperature=self.config.sampling.temperature)

    def _responses(self) -> Responses:
        response = torch.ones(self.rows, self.num_response, dtype=torch.bool)
        return Responses(**_sequences(self), response_mask=response)


class Scalars(Statistics):
    """Scores and values: reward model and critic."""

    def __call__(self, model: Any) -> None:
        """Without gradients."""
        critic_values(model, self._responses(), shift=0.0)


class PolicyLoss(_OfPPO):
    """A micro-batch of the actor's update."""

    def __call__(self, model: Any) -> None:
        """Forward and backward; ends by an exception, before ranks would have to agree on anything."""
        policy_gradient(_Trainee(model), [ppo_batch(self)], config=self.config, denominator=torch.ones(()))  # type: ignore[arg-type]


class ValueLoss(_OfPPO):
    """A micro-batch of the critic's update."""

    def __call__(self, model: Any) -> None:
        """As the actor's."""
        critic: Any = _Trainee(model)
        models = Models(actor=critic, reward=critic, reference=None, critic=critic)
        value_gradient(models, [ppo_batch(self)], config=self.config, denominator=torch.ones(()))


class Answers(_OfPPO):
    """Responses to prompts."""

    def __call__(self, model: Any) -> None:
        """Prompts of full length, and room for responses of full length."""
        tokens = _mask(self.rows, self.num_prompt).flip(1).long()
        prompts = PromptBatch(tokens, tokens.bool(), sample_ids=tokens[:, -1], prompts=("",) * self.rows)
        decoding = Decoding(
            max_new_tokens=self.num_response, stop_token_ids=[0], pad_id=0, sampling=self.config.sampling
        )
        generate(model, prompts, decoding=decoding, seed=0)


def of_ppo(kind: type[_OfPPO], config: PPOConfig, *, rows: int) -> Work:
    """The work `kind` of this configuration on so many rows."""
    plain = {name: value for name, value in as_plain(config).items() if not name.endswith(("engine", "size"))}
    sizes = (rows, config.max_prompt_tokens, config.max_response_tokens)
    return kind(*sizes, config=config, settings=json.dumps(plain, default=str))


def of_supervised(config: StageConfig) -> Work:
    """The loss of SFT or reward modelling on a micro-batch."""
    sizes = (config.micro_batch_size, config.max_prompt_tokens, config.max_response_tokens)
    return Preferences(*sizes, config=config) if isinstance(config, RewardConfig) else Demonstrations(*sizes)


class _Trainee:
    """Stands for an engine where a loss is run backward."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.world = World.alone()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        raise EnoughError


def _sequences(work: Work) -> dict[str, Tensor]:
    mask = _mask(work.rows, work.length)
    return {"sequences": mask.long(), "attention_mask": mask}


def _mask(rows: int, length: int) -> Tensor:
    """One sequence ends a token before the others."""
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[-1, -1] = False
    return mask


def ppo_batch(work: Work) -> PPOBatch:
    """What an update of `work` learns from."""
    response = torch.ones(work.rows, work.num_response, dtype=torch.bool)
    names = ("logprobs", "reference_logprobs", "values", "advantages", "returns")
    return PPOBatch(**_sequences(work), response_mask=response, **{name: response.float() for name in names})
