"""Evaluation: two models answer the same held-out prompts and are compared by judges; the reward model is measured too.

Both draw with the same random numbers. Results go to `eval/results.json` and `eval/samples.jsonl`, or to `eval/NAME/`,
and replace what was there; the judgements of a person are kept in `judgements.jsonl` and never asked for again. Left
out: a place in the memory plan (one frozen model is in memory at a time, which needs less than training it did), and
resuming in the middle.
Run: `python run_pipeline.py stage=eval`, or after the stages, `'stage=[sft,reward,ppo,eval]'`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.loader import collate_demonstrations, collate_preferences, evaluation_batches, evaluation_prompts
from rlhf.algorithms.scores import normalize_scores
from rlhf.config.bounds import as_plain
from rlhf.config.eval_config import EvalConfig
from rlhf.config.roles import Role, roles_of
from rlhf.config.run_config import RunConfig
from rlhf.engine.engine import Engine
from rlhf.evaluation import judges
from rlhf.evaluation.compare import ModelAnswers, PairScores, comparison, sample_rows
from rlhf.evaluation.judges import HUMAN, PAIRS_PER_CALL, REWARD, HumanJudge, Judgement, Pairs
from rlhf.evaluation.metrics import demonstration_losses, gold_values, load_gold, pair_scores
from rlhf.evaluation.result_tables import FOLDER, JUDGEMENTS, RESULTS, SAMPLES, means, text_tables
from rlhf.forward_passes import all_statistics
from rlhf.generation.generate import Decoding
from rlhf.reward_calls import RewardFunctions
from rlhf.reward_functions import RewardRows
from rlhf.rewards import reward_model_scores
from rlhf.rollout import GeneratedResponses, generate_responses, response_ids, response_texts
from rlhf.runtime.atomic_files import write_text
from rlhf.runtime.dist import World, barrier, gather_objects
from rlhf.runtime.process import free_models
from rlhf.text.tokenizer import Tokenizer, decode, stop_token_ids
from rlhf.tracking.jsonl_log import JsonlLog, valid_json
from rlhf.tracking.tracker import start_wandb
from rlhf.types import PromptBatch
from stages.lifecycle.session import stage_tokenizer
from stages.lifecycle.stage_models import open_model, stored_scale
from stages.lifecycle.stage_settings import settings_behind
from stages.setup.preflight import HeldOutRows, held_out_rows

log = logging.getLogger(__name__)


def run_eval(run: RunConfig, world: World) -> None:
    """Evaluate `eval.model`, and compare it with `eval.baseline`."""
    roles = {role.name: role for role in roles_of(run, "eval")}
    tokenizer = stage_tokenizer(run, roles["model"].path)
    rows = held_out_rows(run, tokenizer=tokenizer)
    runner = ModelRunner(run, world, tokenizer=tokenizer, rows=rows)
    for role in roles.values():
        if role.generates:
            runner.generate(role)
    if "reference" in roles:
        runner.measure_kl(roles["reference"])
    reward_scores = runner.score(roles["reward"]) if "reward" in roles else None
    score_by_sources(run, runner, roles=roles)
    prompts = tuple(prompt.text for prompt in rows.prompts)
    answers = {name: with_gold(run, found, prompts=prompts, world=world) for name, found in runner.gathered().items()}
    judgements = ask_judges(run, answers, prompts=prompts, world=world)
    if world.is_main:
        results = comparison(runner.config, answers, pair_scores=reward_scores, judgements=judgements)
        samples = sample_rows(prompts, answers, judgements=judgements)
        folder = results_folder(run)
        lines = [json.dumps(valid_json(row), ensure_ascii=False, allow_nan=False) for row in samples]
        write_text(folder / SAMPLES, "".join(f"{line}\n" for line in lines))
        text = json.dumps(valid_json(results), ensure_ascii=False, allow_nan=False, indent=2)
        write_text(folder / RESULTS, f"{text}\n")
        for table in text_tables(results):
            log.info("%s", table)
        log.info("everything is in %s", folder)
        send_to_wandb(run, results, samples=samples)
    barrier()


def score_by_sources(run: RunConfig, runner: ModelRunner, *, roles: Mapping[str, Role]) -> None:
    """Let the sources of `eval.rewards` score all answers; all ranks must call it."""
    assert run.eval is not None
    for source in run.eval.model_sources().values():
        runner.score_by_model(roles[f"reward {source.name}"], name=source.name)
    runner.score_by_functions(RewardFunctions.load(run.eval, stage="eval"))


def results_folder(run: RunConfig) -> Path:
    """`eval`, or `eval/NAME`."""
    assert run.eval is not None
    return Path(run.output_dir) / FOLDER / (run.eval.name or "")


@dataclass
class LocalAnswers:
    """The responses of a model to this rank's prompts, and what was measured of them so far."""

    responses: GeneratedResponses
    logprobs: Tensor  # [B, R] fp32, under the model itself, at the sampling temperature
    losses: Tensor  # [N, 2], nats and tokens of the demonstrations of all ranks
    numbers: dict[str, Tensor] = field(default_factory=dict)  # [B] each


class ModelRunner:
    """Runs the models, one in memory at a time; all ranks call everything alike.

    A model is opened, does all it is needed for, and is closed before the next. Its responses stay on the rank that
    generated them until `gathered` collects those of all ranks.
    """

    def __init__(self, run: RunConfig, world: World, *, tokenizer: Tokenizer, rows: HeldOutRows) -> None:
        assert run.eval is not None
        self.run, self.world, self.tokenizer, self.rows = run, world, tokenizer, rows
        self.config: EvalConfig = run.eval
        self.answers: dict[str, LocalAnswers] = {}
        """By the name of the role."""

    def generate(self, role: Role) -> None:
        """Let a language model answer the prompts, and measure its losses on the demonstrations."""
        log.info("eval: %s answers", role.path)
        config, pad_id = self.config, int(self.tokenizer.pad_token_id)
        prompts = self._prompts()
        with self._open(role) as engine:
            stops = stop_token_ids(self.tokenizer, engine.module.generation_config)  # type: ignore[arg-type]
            decoding = Decoding(
                config.max_response_tokens,
                stops,
                pad_id=pad_id,
                sampling=config.sampling,
                slots=config.micro_batch_size,
            )
            responses = generate_responses(engine, prompts, decoding=decoding, seed=config.seed)
            logprobs = self._logprobs(engine, responses)
            losses = demonstration_losses(engine, self._batches(self.rows.demonstrations, collate_demonstrations))
        numbers = {"length": responses.response_mask.sum(-1).double(), "not_ended": (~responses.ended).double()}
        self.answers[role.name] = LocalAnswers(responses, logprobs, losses, numbers)

    def measure_kl(self, role: Role) -> None:
        """Measure the KL of every response to a reference model, in nats."""
        log.info("eval: KL to %s", role.path)
        with self._open(role) as engine:
            for answers in self.answers.values():
                ratio = answers.logprobs - self._logprobs(engine, answers.responses)
                answers.numbers["kl"] = ratio.double().sum(-1)  # [B, R] -> [B]

    def score(self, role: Role) -> PairScores:
        """Let a reward model score every response, normalised too if its scale is known, and the held-out pairs."""
        log.info("eval: %s scores", role.path)
        scale, pairs = stored_scale(role.path), self._batches(self.rows.pairs, collate_preferences)
        with self._open(role) as engine:
            for answers in self.answers.values():
                raw = reward_model_scores(engine, answers.responses, limit=self.config.micro_batch_limit)
                answers.numbers["raw_score"] = raw.double()
                if scale is not None:
                    normalized = normalize_scores(raw, mean=scale.mean, std=scale.std, clamp=None)
                    answers.numbers["normalized_score"] = normalized.double()
            chosen, rejected = pair_scores(engine, pairs).tolist() if pairs else ([], [])
        own = self._batches(self.rows.pairs, lambda rows, pad_id: list(rows))  # the same rows in the same order
        subsets = gather_objects([pair.subset for item in own for pair in item.batch[: item.count]])
        return PairScores(chosen, rejected, [name for part in subsets for name in part])

    def score_by_model(self, role: Role, *, name: str) -> None:
        """Let a further reward model score every response, under the name of its source."""
        log.info("eval: %s scores", role.path)
        with self._open(role) as engine:
            for answers in self.answers.values():
                raw = reward_model_scores(engine, answers.responses, limit=self.config.micro_batch_limit)
                answers.numbers[f"reward/{name}"] = raw.double()

    def score_by_functions(self, functions: RewardFunctions) -> None:
        """Let reward functions score every response; NaN where one does not apply. For them, training is over."""
        columns, run = self._prompts().columns, self.run
        steps = run.ppo.iterations if run.ppo else settings_behind(self.config.model or "").get("ppo.iterations", 1)
        for answers in self.answers.values():
            texts = response_texts(answers.responses, partial(decode, self.tokenizer))
            ids = response_ids(answers.responses)
            rows = RewardRows.of(columns, texts=texts, token_ids=ids, step=steps, total_steps=steps)
            for function, scores in zip(functions.functions, functions.score(rows).T, strict=True):
                answers.numbers[f"reward/{function.name}"] = scores.double()

    def gathered(self) -> dict[str, ModelAnswers]:
        """The answers of all ranks in the order of the prompts, by the name of the role."""
        return {name: self._gather(answers) for name, answers in self.answers.items()}

    def _gather(self, answers: LocalAnswers) -> ModelAnswers:
        texts = response_texts(answers.responses, partial(decode, self.tokenizer))
        numbers = {name: column.tolist() for name, column in answers.numbers.items()}
        parts = gather_objects((texts, numbers))
        count = len(self.rows.prompts)  # what follows was answered again to keep the last ranks busy
        return ModelAnswers(
            texts=tuple(text for texts, _ in parts for text in texts)[:count],
            numbers={name: [value for _, part in parts for value in part[name]][:count] for name in numbers},
            losses=[(nats, tokens) for nats, tokens in answers.losses.tolist()],
        )

    def _logprobs(self, engine: Engine, responses: GeneratedResponses) -> Tensor:
        """Log-probabilities `[B, R]`, 0 where masked, at the sampling temperature (of greedy responses, at 1)."""
        temperature = self.config.sampling.temperature or 1.0
        with engine.evaluating() as model:
            return all_statistics(model, responses, limit=self.config.micro_batch_limit, temperature=temperature)[0]

    def _prompts(self) -> PromptBatch:
        """This rank's part of the prompts; the last ranks repeat some."""
        pad_id = int(self.tokenizer.pad_token_id)
        return evaluation_prompts(self.rows.prompts, rank=self.world.rank, ranks=self.world.size, pad_id=pad_id)

    def _batches(self, samples: Sequence[Any], collate: Callable[..., Any]) -> list[Any]:
        """This rank's part of held-out rows."""
        limit, world = self.config.micro_batch_limit, self.world
        padded = partial(collate, pad_id=int(self.tokenizer.pad_token_id))
        return evaluation_batches(samples, padded, limit=limit, rank=world.rank, ranks=world.size)

    @contextmanager
    def _open(self, role: Role) -> Iterator[Engine]:
        free_models()
        engine = open_model(self.run, role, world=self.world)
        try:
            with torch.no_grad():
                yield engine
        finally:
            engine.close()


def with_gold(run: RunConfig, answers: ModelAnswers, *, prompts: Sequence[str], world: World) -> ModelAnswers:
    """On the main rank, the answers with the metrics of `data.gold`; all ranks must call it."""
    found: dict[str, list[float]] = {}
    for name, metric in load_gold(run.data.gold).items():
        values = found[f"gold/{name}"] = []
        for start in range(0, len(prompts), PAIRS_PER_CALL):
            part = slice(start, start + PAIRS_PER_CALL)
            if world.is_main:
                values += gold_values(name, metric, prompts=prompts[part], responses=answers.texts[part])
            barrier()  # after every call: a metric may take long over all responses, and no rank seems to hang
    return replace(answers, numbers=answers.numbers | found)


def ask_judges(
    run: RunConfig, answers: Mapping[str, ModelAnswers], *, prompts: tuple[str, ...], world: World
) -> dict[str, list[Judgement]]:
    """On the main rank, the judgements of each judge on every pair; all ranks must call it."""
    config = run.eval
    assert config is not None
    if "baseline" not in answers:
        return {}
    model, baseline = answers["model"], answers["baseline"]
    pairs = Pairs(prompts, model.texts, baseline.texts)
    questions = judges.random_order(len(pairs), seed=config.seed)
    functions = judges.load_judges(config.judges)
    judgements: dict[str, list[Judgement]] = {name: [] for name in config.judges}
    for name in config.judges:
        log.info("eval: %s judges", name)
        if name == REWARD:
            scores = (found.numbers["raw_score"] for found in (model, baseline))
            judgements[name] = judges.judge_by_scores(*scores, pairs=pairs)
        if name == HUMAN:
            results_folder(run).mkdir(parents=True, exist_ok=True)
            person = HumanJudge(sys.stdin, sys.stdout, JsonlLog(results_folder(run) / JUDGEMENTS, steps=False))
            judgements[name] = person.judge(pairs, questions=questions, seed=config.seed)
        for part in judges.both_orders(questions) if name in functions else ():
            if world.is_main:
                judgements[name] += judges.judge_by_function(name, functions[name], pairs=pairs, questions=part)
            barrier()  # after every call, as above
    return judgements


def send_to_wandb(run: RunConfig, results: Mapping[str, Any], *, samples: Sequence[Mapping[str, Any]]) -> None:
    """Log the means and every answer; an evaluation of the same name continues the same W&B run."""
    wandb = start_wandb(
        results_folder(run),
        root=Path(run.output_dir),
        stage=FOLDER,
        config=run.tracking,
        run_name=run.name,
        run_config=as_plain(run),
    )
    if wandb is None:
        return
    wandb.summary(means(results))
    sides = ((row, side) for row in samples for side in ("model", "baseline") if side in row)
    wandb.samples(0, [{"side": side, "prompt": row["prompt"], **row[side]} for row, side in sides])
    wandb.finish(failed=False)
