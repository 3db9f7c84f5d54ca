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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data.loader import collate_demonstrations, collate_preferences, evaluation_batches, evaluation_prompts
from rlhf.config.bounds import as_plain
from rlhf.config.roles import roles_of
from rlhf.config.run_config import RunConfig
from rlhf.evaluation import judges
from rlhf.evaluation.compare import ModelAnswers, comparison, sample_rows
from rlhf.evaluation.judges import HUMAN, REWARD, HumanJudge, Judgement, Pairs
from rlhf.evaluation.metrics import gold_values, load_gold
from rlhf.evaluation.model_runner import HeldOutBatches, ModelRunner
from rlhf.evaluation.result_tables import FOLDER, JUDGEMENTS, RESULTS, SAMPLES, means, text_tables
from rlhf.runtime.atomic_files import write_text
from rlhf.runtime.dist import World, barrier
from rlhf.text.tokenizer import Tokenizer
from rlhf.tracking.jsonl_log import JsonlLog, valid_json
from rlhf.tracking.tracker import start_wandb
from stages.lifecycle.session import stage_tokenizer
from stages.lifecycle.stage_models import open_model, stored_scale
from stages.setup.preflight import HeldOutRows, held_out_rows

log = logging.getLogger(__name__)


def run_eval(run: RunConfig, world: World) -> None:
    """Evaluate `eval.model`, and compare it with `eval.baseline`."""
    config, roles = run.eval, {role.name: role for role in roles_of(run, "eval")}
    assert config is not None
    tokenizer = stage_tokenizer(run, roles["model"].path)
    rows = held_out_rows(run, tokenizer=tokenizer)
    batches = held_out_batches(rows, tokenizer, micro_batch_size=config.micro_batch_size, world=world)
    runner = ModelRunner(partial(open_model, run, world=world), config, tokenizer, batches)
    for role in roles.values():
        if role.generates:
            runner.generate(role)
    if "reference" in roles:
        runner.measure_kl(roles["reference"])
    pair_scores = None
    if "reward" in roles:
        pair_scores = runner.score(roles["reward"], scale=stored_scale(roles["reward"].path))
    prompts = tuple(prompt.text for prompt in rows.prompts)
    answers = {name: with_gold(run, found, prompts=prompts, world=world) for name, found in runner.gathered().items()}
    judgements = ask_judges(run, answers, prompts=prompts, world=world)
    if world.is_main:
        results = comparison(config, answers, pair_scores=pair_scores, judgements=judgements)
        samples = list(sample_rows(prompts, answers, judgements=judgements))
        write_json(results_folder(run) / SAMPLES, samples)
        write_json(results_folder(run) / RESULTS, [results], indent=2)
        for text in text_tables(results):
            log.info("%s", text)
        log.info("everything is in %s", results_folder(run))
        send_to_wandb(run, results, samples=samples)
    barrier()


def results_folder(run: RunConfig) -> Path:
    """`eval`, or `eval/NAME`."""
    assert run.eval is not None
    return Path(run.output_dir) / FOLDER / (run.eval.name or "")


def held_out_batches(rows: HeldOutRows, tokenizer: Tokenizer, *, micro_batch_size: int, world: World) -> HeldOutBatches:
    """This rank's part of the held-out rows."""
    pad_id = int(tokenizer.pad_token_id)
    batches = partial(evaluation_batches, micro_batch_size=micro_batch_size, rank=world.rank, ranks=world.size)
    return HeldOutBatches(
        prompts=evaluation_prompts(rows.prompts, rank=world.rank, ranks=world.size, pad_id=pad_id),
        num_prompts=len(rows.prompts),
        demonstrations=batches(rows.demonstrations, partial(collate_demonstrations, pad_id=pad_id)),
        pairs=batches(rows.pairs, partial(collate_preferences, pad_id=pad_id)),
        subsets=[pair.subset for item in batches(rows.pairs, list) for pair in item.batch[: item.count]],
    )


def with_gold(run: RunConfig, answers: ModelAnswers, *, prompts: Sequence[str], world: World) -> ModelAnswers:
    """On the main rank, the answers with the metrics of `data.gold`; all ranks must call it."""
    gold = load_gold(run.data.gold)
    found: dict[str, list[float]] = {f"gold/{name}": [] for name in gold}
    for start in range(0, len(prompts), judges.PAIRS_PER_CALL):
        part = slice(start, start + judges.PAIRS_PER_CALL)
        for name, metric in gold.items():
            if world.is_main:
                responses = answers.texts[part]
                found[f"gold/{name}"] += gold_values(name, metric, prompts=prompts[part], responses=responses)
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
    judgements: dict[str, list[Judgement]] = {}
    for name in config.judges:
        log.info("eval: %s judges", name)
        if name == REWARD:
            scores = (found.numbers["raw_score"] for found in (model, baseline))
            judgements[name] = judges.judge_by_scores(*scores, pairs=pairs)
            continue
        if name == HUMAN:
            results_folder(run).mkdir(parents=True, exist_ok=True)
            kept = JsonlLog(results_folder(run) / JUDGEMENTS, steps=False)
            person = HumanJudge(sys.stdin, sys.stdout, kept)
            judgements[name] = person.judge(pairs, questions=questions, seed=config.seed)
            continue
        judgements[name] = []
        for part in judges.both_orders(questions):
            if world.is_main:
                judgements[name] += judges.judge_by_function(name, functions[name], pairs=pairs, questions=part)
            barrier()  # after every call, as above
    return judgements


def write_json(path: Path, rows: Iterable[Mapping[str, Any]], *, indent: int | None = None) -> None:
    """Write each row as JSON, all of them or nothing."""
    lines = (json.dumps(valid_json(row), ensure_ascii=False, allow_nan=False, indent=indent) for row in rows)
    write_text(path, "".join(f"{line}\n" for line in lines))


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
