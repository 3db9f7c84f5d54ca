"""The computations of each stage on batches of the largest size: the stage's own code, for the planner to trace.

Sequences are as long as the configuration allows, and one of them is shorter, so that there is a mask. The benchmarks
run the same workloads on real models. Left out: the bytes that they take (`trace.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.bounds import MicroBatchLimit, as_plain
from rlhf.config.run_config import SUPERVISED
from rlhf.forward_passes import critic_values, response_statistics
from rlhf.generation.decode_graphs import DecodeGraphs, why_not
from rlhf.generation.generate import Decoding, answer
from rlhf.memory_plan.trace import EnoughError
from rlhf.rollout import Models
from rlhf.runtime.dist import World
from rlhf.training.ppo_update import policy_gradient, text_backward, value_gradient
from rlhf.training.supervised_step import objective_of
from rlhf.types import WIDTHS, PPOBatch, PreferenceBatch, Responses, SFTBatch, width_of

_NOT_TRACED = ("engine", "optimizer", "size", "micro_batch_tokens", "lora")
"""Ends of the names of settings that decide nothing about the tensors of a workload beyond its rows and its model."""


@dataclass(frozen=True)
class Workload:
    """A computation on a batch of `rows`; two that are equal take the same memory on the same model."""

    compute: Callable[[Any, Workload], Tensor | None]
    """One of the functions below; a loss that it returns is to be run backward."""
    config: Any = field(compare=False, repr=False)
    """The stage's configuration, which has no hash."""
    settings: str
    """The settings that may decide which tensors are made, as text."""
    rows: int
    """Sequences, or pairs of them."""
    prompt: int
    """Tokens of the longest prompt among them."""
    response: int
    """Tokens of the longest response among them."""
    text: tuple[int, int]
    """Rows and tokens of the text beside them (`ppo.ptx`); 0 where there is none."""
    chunk_elements: int | None
    """As in `Wanted`."""
    captures: bool = False
    """Whether steps of decoding are captured as CUDA graphs."""

    @classmethod
    def of(
        cls, compute: Callable[..., Tensor | None], config: Any, *, ranks: int = 1, chunk_elements: int | None = None
    ) -> Workload:
        """The batch of one rank with the longest rows of this configuration."""
        plain = {name: value for name, value in as_plain(config).items() if not name.endswith(_NOT_TRACED)}
        prompt, response, limit = config.max_prompt_tokens, config.max_response_tokens, config.micro_batch_limit
        rows, text = limit.rows_of(config.sequences_per_row * (prompt + response)), (0, 0)
        if compute is generation:  # a batch of the rollout, or this rank's share where that is less
            rows = min(config.rollout_micro_batch_size, -(-config.rollout_size // ranks))
        if compute is policy_update and config.ptx.coef:
            text = (limit.rows_of(config.ptx_tokens), config.ptx_tokens)
        settings = json.dumps(plain, default=str)
        return cls(compute, config, settings, rows, prompt, response, text, chunk_elements)

    @classmethod
    def largest(
        cls, compute: Callable[..., Tensor | None], config: Any, *, ranks: int = 1, chunk_elements: int | None = None
    ) -> list[Workload]:
        """The batches of one rank that may take the most: one of the longest rows, and one of the most tokens.

        They differ where tokens are limited. Shorter rows then use up what is left of the limit, and with the shortest
        prompts nearly all their tokens are those of responses, which go through the head.
        """
        longest = cls.of(compute, config, ranks=ranks, chunk_elements=chunk_elements)
        limit: MicroBatchLimit = config.micro_batch_limit
        if limit.tokens is None or compute is generation:
            return [longest]
        limit = replace(limit, tokens=max(1, limit.tokens // config.sequences_per_row))  # for each sequence of a row
        width = longest.prompt + longest.response
        shortest = width if compute in _EXAMPLES.values() else 1 + longest.response
        rows, tokens = _fullest(limit, shortest, longest=width)
        response = min(longest.response, tokens - 1)
        most = replace(longest, rows=rows, prompt=tokens - response, response=response)
        if longest.text[1]:
            most = replace(most, text=_fullest(limit, longest.text[1], longest=longest.text[1]))
        return list(dict.fromkeys((longest, most)))

    def __call__(self, model: nn.Module) -> Tensor | None:
        """Run it."""
        return self.compute(model, self)

    def mask(self, rows: int, num_tokens: int = 0) -> Tensor:
        """`[rows, num_tokens]`, or `[rows, T]`, bool: one sequence ends a token before the others."""
        mask = torch.ones(rows, width_of(num_tokens or self.prompt + self.response), dtype=torch.bool)
        mask[-1, -1] = False
        return mask

    def responses(self) -> dict[str, Tensor]:
        """Fields of sequences `[B, T]` and their responses `[B, R]`."""
        mask = self.mask(self.rows)
        response = torch.ones(self.rows, self.response, dtype=torch.bool)
        return {"sequences": mask.long(), "attention_mask": mask, "response_mask": response}

    def ppo_batch(self) -> PPOBatch:
        """A micro-batch of an update."""
        fields: dict[str, Any] = self.responses()
        names = ("logprobs", "reference_logprobs", "values", "advantages", "returns")
        return PPOBatch(**fields, **{name: fields["response_mask"].float() for name in names})


def _fullest(limit: MicroBatchLimit, shortest: int, *, longest: int) -> tuple[int, int]:
    """Rows, and their tokens from about `shortest` to `longest`, that come closest to the limit of tokens."""
    assert limit.tokens is not None
    rows = min(limit.rows, -(-limit.tokens // shortest))
    tokens = min(longest, limit.tokens // rows // WIDTHS * WIDTHS)
    return (rows, tokens) if rows > 1 and tokens > 1 else (1, longest)


def demonstrations(model: Any, work: Workload) -> Tensor:
    """The loss of demonstrations, where every token is learnt."""
    mask = work.mask(work.rows)
    return _loss(model, work, batch=SFTBatch(input_ids=mask.long(), attention_mask=mask, target_mask=mask))


def preferences(model: Any, work: Workload) -> Tensor:
    """The loss of pairs, both responses in one batch."""
    mask, zeros = work.mask(2 * work.rows), torch.zeros(2 * work.rows)
    fields = {"target_mask": mask, "margin": zeros[: work.rows], "reference_logprobs": zeros}
    return _loss(model, work, batch=PreferenceBatch(input_ids=mask.long(), attention_mask=mask, **fields))


def _loss(model: Any, work: Workload, *, batch: SFTBatch | PreferenceBatch) -> Tensor:
    objective = objective_of(work.config, chunk_elements=work.chunk_elements)
    return objective.outcome(model, batch, denominator=torch.ones(())).loss


def generation(model: Any, work: Workload) -> None:
    """Responses of full length to prompts of full length, but for one; all of them differ."""
    longest, new = work.prompt, work.response
    prompts = [[row >> bit & 1 for bit in range(longest)] for row in range(work.rows)]
    prompts[-1] = prompts[-1][: max(1, longest - 1)]
    graphs = DecodeGraphs() if work.captures and not why_not(model) else None
    decoding = Decoding(new, stop_token_ids=[0], pad_id=0, sampling=work.config.sampling, graphs=graphs)
    answer(model, prompts, sample_ids=torch.arange(work.rows), decoding=decoding, seed=0)


def statistics(model: nn.Module, work: Workload) -> None:
    """Log-probabilities and entropies of responses, without gradients."""
    temperature, batch = work.config.sampling.temperature, Responses(**work.responses())
    response_statistics(model, batch, temperature=temperature, chunk_elements=work.chunk_elements)


def scalars(model: nn.Module, work: Workload) -> None:
    """Scores or values of responses, without gradients."""
    critic_values(model, Responses(**work.responses()), shift=0.0)


def policy_update(model: nn.Module, work: Workload) -> None:
    """A micro-batch of the actor's update; ends by an exception, before ranks would have to agree on anything."""
    actor: Any = _TracedEngine(model)
    if work.text[0]:  # a micro-batch of text comes before
        mask = work.mask(*work.text)
        text = SFTBatch(input_ids=mask.long(), attention_mask=mask, target_mask=mask)
        text_backward(actor, text, coef=1.0, denominator=torch.ones(()), chunk_elements=work.chunk_elements)
    batches, denominator, chunk = [work.ppo_batch()], torch.ones(()), work.chunk_elements
    policy_gradient(actor, batches, config=work.config, denominator=denominator, chunk_elements=chunk)


def value_update(model: nn.Module, work: Workload) -> None:
    """A micro-batch of the critic's update; ends by an exception, as the actor's."""
    critic: Any = _TracedEngine(model)
    models = Models(actor=critic, rewards={}, reference=None, critic=critic)
    value_gradient(models, [work.ppo_batch()], config=work.config, denominator=torch.ones(()))


class _TracedEngine:
    """Stands for an engine where a loss is run backward."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.world = World.alone()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if last:
            raise EnoughError


REFERENCE = "reference"
"""The phase of the models that leave before training, which alone are there."""
_EXAMPLES = {"sequences": demonstrations, "pairs": preferences}
PHASES: dict[str, dict[str, dict[str, Callable[..., Tensor | None]]]] = {
    **{
        stage: {REFERENCE: {"reference": _EXAMPLES[settings.row_unit]}}
        | dict.fromkeys(("evaluate", "train"), {"model": _EXAMPLES[settings.row_unit]})
        for stage, settings in SUPERVISED.items()
    },
    "ppo": {
        "generate": {"actor": generation},
        "score": {"actor": statistics, "reference": statistics, "reward": scalars, "critic": scalars},
        "train": {"actor": policy_update, "critic": value_update},
    },
}
"""What the models of each stage compute, by phase and role. In `train` the roles learn, in `generate` they decode."""
ROLLOUTS = {"generate": 1, "score": 2, "train": 1, "save": 1}
"""How many rollouts are there in each phase of PPO: the last one stays until another has taken its place."""
