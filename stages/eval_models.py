"""Two models and those that judge them, one in memory at a time: what they say, and what is measured of it.

A model is opened, does everything that it is needed for, and is closed before the next. What it has said stays on the
rank that said it until `answers` brings all of it together. Left out: what the numbers come to (`compare.py`).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from data.assemble import LengthLimits
from data.collate import collate_demonstrations, collate_preferences
from data.loader import EvalBatch, evaluation_batches, evaluation_prompts
from data.samples import Demonstration, Preference, Prompt, demonstrations, preferences, prompts
from rlhf.algorithms.scores import normalize_scores
from rlhf.config.data_config import DataConfig, StageDataConfig
from rlhf.config.eval_config import EvalConfig
from rlhf.engine.engine import Engine
from rlhf.evaluation.compare import Answers
from rlhf.evaluation.metrics import pair_scores, row_losses
from rlhf.generation.generate import Decoding
from rlhf.models.causal_lm import causal_lm
from rlhf.models.model_spec import ModelSpec
from rlhf.models.scalar_head import scalar_head_model
from rlhf.rollout import Said, say, scores_of, statistics_of, texts_of
from rlhf.runtime.dist import World, gather_objects
from rlhf.runtime.malloc import trim
from rlhf.text.tokenizer import Tokenizer, decode, stop_token_ids
from rlhf.types import PromptBatch
from stages.lifecycle.stage_models import open_engine, stored_scale

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """What no model was trained on."""

    prompts: list[Prompt]
    pairs: list[Preference]
    demonstrations: list[Demonstration]

    @classmethod
    def read(cls, data: DataConfig, config: EvalConfig, *, tokenizer: Tokenizer) -> HeldOut:
        """The first held-out rows of each kind; pairs only where there is a reward model.

        Raises:
            ValueError: rows that cannot be used, or all of them longer than the limits.
        """
        short = LengthLimits("eval", config.max_prompt_tokens, config.max_response_tokens)
        long = LengthLimits("eval", config.max_prompt_tokens, config.max_row_tokens, "max_row_tokens")
        most = config.rows or None
        pairs: list[Preference] = []
        demos: list[Demonstration] = []
        if config.reward is not None and _has_rows(data.reward):
            pairs = preferences(data, config, tokenizer=tokenizer, held_out=long).eval[:most]
        if _has_rows(data.sft):
            demos = demonstrations(data, config, tokenizer=tokenizer, held_out=long).eval[:most]
        asked = prompts(data, config, tokenizer=tokenizer, held_out=short).eval
        return cls(asked[: config.prompts], pairs, demos)


def _has_rows(sources: StageDataConfig) -> bool:
    return bool(sources.train or sources.eval)


@dataclass
class Contestant:
    """What a model has said to this rank's prompts, and what was measured of it so far."""

    said: Said
    logprobs: Tensor  # [B, R] fp32, under the model itself, at the sampling temperature
    losses: Tensor  # [N, 2], nats and tokens of all ranks' demonstrations
    numbers: dict[str, Tensor] = field(default_factory=dict)
    """`[B]` each."""


@dataclass(frozen=True)
class PairScores:
    """What a reward model says of all held-out pairs."""

    chosen: list[float]
    rejected: list[float]
    subsets: list[str]


@dataclass(frozen=True)
class Room:
    """Where models are opened and asked; all ranks call everything alike."""

    config: EvalConfig
    world: World
    tokenizer: Tokenizer
    held_out: HeldOut

    def ask(self, path: str) -> Contestant:
        """Have the language model at `path` answer, and read the demonstrations."""
        log.info("eval: %s answers", path)
        with self._open(causal_lm(path)) as engine:
            said = say(engine, self._prompts, decoding=self._decoding(engine), size=self._size, seed=self.config.seed)
            logprobs = self._logprobs(engine, said)
            losses = row_losses(engine, self._demonstrations)
        numbers = {"length": said.response_mask.sum(-1).double(), "not_ended": (~said.ended).double()}
        return Contestant(said, logprobs, losses, numbers)

    def measure_kl(self, path: str, contestants: Sequence[Contestant]) -> None:
        """Note how far each response is from what the model at `path` would say, in nats."""
        log.info("eval: how far from %s that is", path)
        with self._open(causal_lm(path)) as engine:
            for contestant in contestants:
                ratio = contestant.logprobs - self._logprobs(engine, contestant.said)
                contestant.numbers["kl"] = ratio.double().sum(-1)

    def score(self, path: str, contestants: Sequence[Contestant]) -> PairScores:
        """Have the reward model at `path` score each response, and the held-out pairs."""
        scale = stored_scale(path)
        groups = evaluation_batches(
            self.held_out.pairs, list, micro_batch_size=self._size, rank=self.world.rank, ranks=self.world.size
        )
        pad_id = int(self.tokenizer.pad_token_id)
        batches = [EvalBatch(collate_preferences(group.batch, pad_id), group.count) for group in groups]
        log.info("eval: %s scores", path)
        with self._open(scalar_head_model(path)) as engine:
            for contestant in contestants:
                raw = scores_of(engine, contestant.said, size=self._size)
                if scale is not None:
                    normal = normalize_scores(raw, mean=scale.mean, std=scale.std, clamp=None)
                    contestant.numbers["normalized_score"] = normal.double()
                contestant.numbers["raw_score"] = raw.double()
            chosen, rejected = pair_scores(engine, batches).tolist() if batches else ([], [])
        named = gather_objects([pair.subset for group in groups for pair in group.batch[: group.count]])
        return PairScores(chosen, rejected, [subset for part in named for subset in part])

    def answers(self, contestant: Contestant) -> Answers:
        """What a contestant has said on all ranks, in the order of the prompts."""
        texts = texts_of(contestant.said, partial(decode, self.tokenizer))
        numbers = {name: column.tolist() for name, column in contestant.numbers.items()}
        parts = gather_objects((texts, numbers))
        count = len(self.held_out.prompts)  # the last ranks have answered some of them again
        return Answers(
            texts=tuple(text for texts, _ in parts for text in texts)[:count],
            numbers={name: [value for _, part in parts for value in part[name]][:count] for name in numbers},
            losses=[(nats, tokens) for nats, tokens in contestant.losses.tolist()],
        )

    @property
    def _size(self) -> int:
        return self.config.micro_batch_size

    @cached_property
    def _prompts(self) -> PromptBatch:
        rank, ranks, pad_id = self.world.rank, self.world.size, int(self.tokenizer.pad_token_id)
        return evaluation_prompts(self.held_out.prompts, rank=rank, ranks=ranks, pad_id=pad_id)

    @cached_property
    def _demonstrations(self) -> list[EvalBatch]:
        collate = partial(collate_demonstrations, pad_id=int(self.tokenizer.pad_token_id))
        rank, ranks = self.world.rank, self.world.size
        rows = self.held_out.demonstrations
        return evaluation_batches(rows, collate, micro_batch_size=self._size, rank=rank, ranks=ranks)

    def _decoding(self, engine: Engine) -> Decoding:
        config = self.config
        stops = stop_token_ids(self.tokenizer, engine.module.generation_config)
        return Decoding(
            config.max_response_tokens, stops, pad_id=int(self.tokenizer.pad_token_id), sampling=config.sampling
        )

    def _logprobs(self, engine: Engine, said: Said) -> Tensor:
        """Log-probability of each response token, 0 where masked, at the sampling temperature (greedy: at 1)."""
        temperature = self.config.sampling.temperature or 1.0
        with engine.evaluating() as model:
            return statistics_of(model, said, size=self._size, temperature=temperature)[0]

    @contextmanager
    def _open(self, spec: ModelSpec) -> Iterator[Engine]:
        gc.collect()  # the model before, which holds itself in cycles
        trim()
        engine = open_engine(spec, config=self.config.engine, world=self.world)
        try:
            with torch.no_grad():
                yield engine
        finally:
            engine.close()
