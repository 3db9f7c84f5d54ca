"""Runs the models of an evaluation, one in memory at a time: responses, KL, scores and losses.

A model is opened, does all it is needed for, and is closed before the next. Its responses stay on the rank that
generated them until `gathered` collects those of all ranks. See also: `compare.py`, which turns them into results.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from rlhf.algorithms.scores import normalize_scores
from rlhf.config.eval_config import EvalConfig
from rlhf.config.roles import Role
from rlhf.engine.engine import Engine
from rlhf.evaluation.compare import ModelAnswers, PairScores
from rlhf.evaluation.metrics import demonstration_losses, pair_scores
from rlhf.forward_passes import all_statistics
from rlhf.generation.generate import Decoding
from rlhf.rewards import ScoreScale, reward_model_scores
from rlhf.rollout import GeneratedResponses, generate_responses, response_texts
from rlhf.runtime.dist import gather_objects
from rlhf.runtime.process import trim
from rlhf.text.tokenizer import Tokenizer, decode, stop_token_ids
from rlhf.types import EvalBatch, PreferenceBatch, PromptBatch, SFTBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutBatches:
    """This rank's part of the held-out data."""

    prompts: PromptBatch
    """Equally many on every rank: the last ranks repeat some."""
    num_prompts: int
    """Different prompts, of all ranks."""
    demonstrations: Sequence[EvalBatch[SFTBatch]]
    pairs: Sequence[EvalBatch[PreferenceBatch]]
    subsets: Sequence[str]
    """The part of the data that each counted pair of `pairs` belongs to."""


@dataclass
class LocalAnswers:
    """The responses of a model to this rank's prompts, and what was measured of them so far."""

    responses: GeneratedResponses
    logprobs: Tensor  # [B, R] fp32, under the model itself, at the sampling temperature
    losses: Tensor  # [N, 2], nats and tokens of the demonstrations of all ranks
    numbers: dict[str, Tensor] = field(default_factory=dict)  # [B] each


@dataclass
class ModelRunner:
    """Opens models and measures them; all ranks call everything alike."""

    open_model: Callable[[Role], Engine]
    config: EvalConfig
    tokenizer: Tokenizer
    data: HeldOutBatches
    answers: dict[str, LocalAnswers] = field(default_factory=dict)
    """By the name of the role."""

    def generate(self, role: Role) -> None:
        """Let a language model answer the prompts, and measure its losses on the demonstrations."""
        log.info("eval: %s answers", role.path)
        with self._open(role) as engine:
            decoding = Decoding(
                self.config.max_response_tokens,
                stop_token_ids(self.tokenizer, engine.module.generation_config),  # type: ignore[arg-type]
                pad_id=int(self.tokenizer.pad_token_id),
                sampling=self.config.sampling,
            )
            size = self.config.micro_batch_size
            responses = generate_responses(
                engine, self.data.prompts, decoding=decoding, size=size, seed=self.config.seed
            )
            logprobs = self._logprobs(engine, responses)
            losses = demonstration_losses(engine, self.data.demonstrations)
        numbers = {"length": responses.response_mask.sum(-1).double(), "not_ended": (~responses.ended).double()}
        self.answers[role.name] = LocalAnswers(responses, logprobs, losses, numbers)

    def measure_kl(self, role: Role) -> None:
        """Measure the KL of every response to a reference model, in nats."""
        log.info("eval: KL to %s", role.path)
        with self._open(role) as engine:
            for answers in self.answers.values():
                ratio = answers.logprobs - self._logprobs(engine, answers.responses)
                answers.numbers["kl"] = ratio.double().sum(-1)

    def score(self, role: Role, *, scale: ScoreScale | None) -> PairScores:
        """Let a reward model score every response and the held-out pairs.

        Args:
            role: the reward model.
            scale: held-out mean and deviation of its scores; None leaves out normalised scores.
        """
        log.info("eval: %s scores", role.path)
        with self._open(role) as engine:
            for answers in self.answers.values():
                raw = reward_model_scores(engine, answers.responses, size=self.config.micro_batch_size)
                answers.numbers["raw_score"] = raw.double()
                if scale is not None:
                    normalized = normalize_scores(raw, mean=scale.mean, std=scale.std, clamp=None)
                    answers.numbers["normalized_score"] = normalized.double()
            chosen, rejected = pair_scores(engine, self.data.pairs).tolist() if self.data.pairs else ([], [])
        subsets = gather_objects(list(self.data.subsets))
        return PairScores(chosen, rejected, [name for part in subsets for name in part])

    def gathered(self) -> dict[str, ModelAnswers]:
        """The answers of all ranks in the order of the prompts, by the name of the role."""
        return {name: self._gather(answers) for name, answers in self.answers.items()}

    def _gather(self, answers: LocalAnswers) -> ModelAnswers:
        texts = response_texts(answers.responses, partial(decode, self.tokenizer))
        numbers = {name: column.tolist() for name, column in answers.numbers.items()}
        parts = gather_objects((texts, numbers))
        count = self.data.num_prompts  # what follows was answered again to keep the last ranks busy
        return ModelAnswers(
            texts=tuple(text for texts, _ in parts for text in texts)[:count],
            numbers={name: [value for _, part in parts for value in part[name]][:count] for name in numbers},
            losses=[(nats, tokens) for nats, tokens in answers.losses.tolist()],
        )

    def _logprobs(self, engine: Engine, responses: GeneratedResponses) -> Tensor:
        """Log-probabilities `[B, R]`, 0 where masked, at the sampling temperature (of greedy responses, at 1)."""
        temperature = self.config.sampling.temperature or 1.0
        with engine.evaluating() as model:
            return all_statistics(model, responses, size=self.config.micro_batch_size, temperature=temperature)[0]

    @contextmanager
    def _open(self, role: Role) -> Iterator[Engine]:
        gc.collect()  # the last model is part of reference cycles, and its memory is needed now
        trim()
        engine = self.open_model(role)
        try:
            with torch.no_grad():
                yield engine
        finally:
            engine.close()
