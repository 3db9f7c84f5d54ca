"""The computations of each stage on batches of the largest size: the stage's own code, for the planner to trace.

Sequences are as long as the configuration allows, and one of them is shorter, so that there is a mask. The benchmarks
run the same workloads on real models. Left out: the bytes that they take (`trace.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from rlhf.config.bounds import as_plain
from rlhf.config.ppo_config import PPOConfig
from rlhf.config.run_config import SUPERVISED
from rlhf.config.stage_configs import ModelKind, SupervisedConfig, TrainingConfig
from rlhf.forward_passes import critic_values, response_statistics
from rlhf.generation.generate import Decoding, generate
from rlhf.memory_plan.trace import EnoughError
from rlhf.rollout import Models
from rlhf.runtime.dist import World
from rlhf.training.ppo_update import policy_gradient, value_gradient
from rlhf.training.supervised_step import objective_of
from rlhf.types import PPOBatch, PreferenceBatch, PromptBatch, Responses, SFTBatch

Config = TypeVar("Config", bound=TrainingConfig)

_NOT_TRACED = ("engine", "optimizer", "size", "lora")
"""Ends of the names of settings that decide nothing about the tensors of a workload beyond its rows and its model."""


@dataclass(frozen=True)
class Workload(Generic[Config]):
    """A computation on a batch of `rows`; two that are equal take the same memory on the same model."""

    config: Config = field(compare=False, repr=False)
    settings: str
    """The settings that may decide which tensors a loss makes, as text, because a configuration has no hash."""
    rows: int
    num_prompt: int
    num_response: int
    chunk_elements: int | None = None
    """As in `token_logprobs`."""

    @classmethod
    def of(cls, config: Config, *, ranks: int = 1, chunk_elements: int | None = None) -> Workload[Config]:
        """The workload of one rank with this configuration."""
        plain = {name: value for name, value in as_plain(config).items() if not name.endswith(_NOT_TRACED)}
        sizes = cls.rows_of(config, ranks), config.max_prompt_tokens, config.max_response_tokens
        return cls(config, json.dumps(plain, default=str), *sizes, chunk_elements)

    @classmethod
    def rows_of(cls, config: Config, ranks: int) -> int:
        """Rows of the largest batch on one rank."""
        return config.micro_batch_size

    def __call__(self, model: nn.Module) -> Tensor | None:
        """Run it; what is returned is to be run backward."""
        raise NotImplementedError

    def mask(self, rows: int, num_tokens: int = 0) -> Tensor:
        """`[rows, num_tokens]`, or `[rows, T]`, bool: one sequence ends a token before the others."""
        mask = torch.ones(rows, num_tokens or self.num_prompt + self.num_response, dtype=torch.bool)
        mask[-1, -1] = False
        return mask

    def responses(self) -> dict[str, Tensor]:
        """Fields of sequences `[B, T]` and their responses `[B, R]`."""
        mask = self.mask(self.rows)
        response = torch.ones(self.rows, self.num_response, dtype=torch.bool)
        return {"sequences": mask.long(), "attention_mask": mask, "response_mask": response}

    def ppo_batch(self) -> PPOBatch:
        """A micro-batch of an update."""
        fields = self.responses()
        names = ("logprobs", "reference_logprobs", "values", "advantages", "returns")
        return PPOBatch(**fields, **{name: fields["response_mask"].float() for name in names})


class Examples(Workload[SupervisedConfig]):
    """The loss of a stage that learns from examples."""

    def __call__(self, model: Any) -> Tensor:
        """On its largest batch."""
        objective = objective_of(self.config, chunk_elements=self.chunk_elements)
        return objective.outcome(model, self.batch(), denominator=torch.ones(())).loss

    def batch(self) -> SFTBatch | PreferenceBatch:
        """The examples of a micro-batch."""
        raise NotImplementedError


class Demonstrations(Examples):
    """Demonstrations of which every token is learnt."""

    def batch(self) -> SFTBatch:
        """One sequence each."""
        mask = self.mask(self.rows)
        return SFTBatch(input_ids=mask.long(), attention_mask=mask, target_mask=mask)


class Preferences(Examples):
    """Pairs of responses."""

    def batch(self) -> PreferenceBatch:
        """Both responses in one batch."""
        mask = self.mask(2 * self.rows)
        return PreferenceBatch(input_ids=mask.long(), attention_mask=mask, margin=torch.zeros(self.rows))


class Statistics(Workload[PPOConfig]):
    """Log-probabilities and entropies of responses: actor and reference."""

    def __call__(self, model: nn.Module) -> None:
        """Without gradients."""
        temperature = self.config.sampling.temperature
        batch = Responses(**self.responses())
        response_statistics(model, batch, temperature=temperature, chunk_elements=self.chunk_elements)


class Scalars(Workload[PPOConfig]):
    """Scores and values: reward model and critic."""

    def __call__(self, model: nn.Module) -> None:
        """Without gradients."""
        critic_values(model, Responses(**self.responses()), shift=0.0)


class PolicyUpdate(Workload[PPOConfig]):
    """A micro-batch of the actor's update."""

    def __call__(self, model: nn.Module) -> None:
        """Forward and backward; ends by an exception, before ranks would have to agree on anything."""
        policy_gradient(
            _TracedEngine(model),  # type: ignore[arg-type]
            [self.ppo_batch()],
            config=self.config,
            denominator=torch.ones(()),
            chunk_elements=self.chunk_elements,
        )


class ValueUpdate(Workload[PPOConfig]):
    """A micro-batch of the critic's update."""

    def __call__(self, model: nn.Module) -> None:
        """Forward and backward; ends by an exception, as the actor's."""
        critic: Any = _TracedEngine(model)
        models = Models(actor=critic, reward=critic, reference=None, critic=critic)
        value_gradient(models, [self.ppo_batch()], config=self.config, denominator=torch.ones(()))


class Answers(Workload[PPOConfig]):
    """Responses to prompts."""

    @classmethod
    def rows_of(cls, config: PPOConfig, ranks: int) -> int:
        """A batch of the rollout, or this rank's share where that is less."""
        return min(config.rollout_micro_batch_size, -(-config.rollout_size // ranks))

    def __call__(self, model: Any) -> None:
        """Prompts of full length, with room for responses of full length."""
        tokens = self.mask(self.rows, self.num_prompt).flip(1).long()  # padded on the left
        texts = ("",) * self.rows
        prompts = PromptBatch(tokens, tokens.bool(), tokens[:, -1], prompts=texts, columns=({},) * self.rows)
        decoding = Decoding(
            max_new_tokens=self.num_response, stop_token_ids=[0], pad_id=0, sampling=self.config.sampling
        )
        generate(model, prompts, decoding=decoding, seed=0)


class _TracedEngine:
    """Stands for an engine where a loss is run backward."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.world = World.alone()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        raise EnoughError


_LM, _HEAD = ModelKind.causal_lm, ModelKind.scalar_head
_EXAMPLES: dict[str, type[Examples]] = {"demonstrations": Demonstrations, "preferences": Preferences}
PHASES: dict[str, dict[str, dict[ModelKind, type[Workload[Any]]]]] = {
    **{
        stage: dict.fromkeys(("evaluate", "train"), {settings.kind: _EXAMPLES[settings.rows]})
        for stage, settings in SUPERVISED.items()
    },
    "ppo": {
        "generate": {_LM: Answers},
        "score": {_HEAD: Scalars, _LM: Statistics},
        "train": {_LM: PolicyUpdate, _HEAD: ValueUpdate},
    },
}
"""The workloads of each stage by phase and kind of model; only models that generate, or are trained, do so."""
