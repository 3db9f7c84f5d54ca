"""Evaluation: what two models say to held-out prompts, judged and compared, and how good the reward model is.

Both answer the same prompts with the same random numbers. Results go to `eval/results.json` and `eval/samples.jsonl`,
or to `eval/NAME/`, and replace what was there, each file at once; what a person has judged is kept in
`judgements.jsonl` and never asked again. Left out: a place in the memory plan (one frozen model is in memory at a
time, which needs less than training it did), and going on in the middle after an interruption.
Run: `python run_pipeline.py stage=eval`, or after the stages, `'stage=[sft,reward,ppo,eval]'`.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.config.bounds import as_plain
from rlhf.config.eval_config import EvalConfig
from rlhf.config.roles import roles_of
from rlhf.config.run_config import RunConfig
from rlhf.evaluation import judges
from rlhf.evaluation.compare import Answers, measures, outcomes_by_pair, reward_model_quality, win_rate
from rlhf.evaluation.judges import HUMAN, REWARD, Pairs, Person, Verdict
from rlhf.evaluation.metrics import load_gold
from rlhf.runtime.atomic_files import write_text
from rlhf.runtime.dist import World, barrier
from rlhf.runtime.errors import RunError
from rlhf.tracking.evaluation_tables import FOLDER, JUDGEMENTS, RESULTS, SAMPLES, summary_of, tables
from rlhf.tracking.jsonl_log import JsonlLog, valid_json
from rlhf.tracking.text_table import table
from rlhf.tracking.tracker import start_wandb
from stages.eval_models import PairScores, Room
from stages.lifecycle.session import stage_tokenizer
from stages.setup.eval_checks import held_out_rows

log = logging.getLogger(__name__)


def run_eval(run: RunConfig, world: World) -> None:
    """Evaluate `eval.model`, and compare it with `eval.baseline`."""
    config = run.eval
    assert config is not None
    tokenizer = stage_tokenizer(run, config.model)
    rows = held_out_rows(run, config, tokenizer=tokenizer)
    room = Room(config, world, tokenizer, rows)
    sides = {role.name: role.path for role in roles_of(run, "eval") if role.writes}
    contestants = {side: room.ask(path) for side, path in sides.items()}
    if config.reference is not None:
        room.measure_kl(config.reference, list(contestants.values()))
    scores = None if config.reward is None else room.score(config.reward, list(contestants.values()))
    prompts = tuple(prompt.text for prompt in rows.prompts)
    answers = {side: room.answers(contestant) for side, contestant in contestants.items()}
    answers = {side: with_gold(run, found, prompts=prompts, world=world) for side, found in answers.items()}
    folder = folder_of(run, config)
    verdicts = judge(config, answers, prompts=prompts, folder=folder, world=world)
    if world.is_main:
        results = results_of(config, answers, scores=scores, verdicts=verdicts)
        samples = list(sample_rows(prompts, answers, verdicts=verdicts))
        write_lines(folder / SAMPLES, samples)
        write_lines(folder / RESULTS, [results], indent=2)
        show(results, folder)
        send(run, results, samples=samples, folder=folder)
    barrier()


def folder_of(run: RunConfig, config: EvalConfig) -> Path:
    """Where the results go."""
    return Path(run.output_dir) / FOLDER / (config.name or "")


def with_gold(run: RunConfig, answers: Answers, *, prompts: Sequence[str], world: World) -> Answers:
    """On the main rank the answers with the metrics of `data.gold`, which stand before what is only counted.

    All ranks must call it; the others wait for a few answers at a time, as with judges.
    """
    found: dict[str, list[float]] = {}
    for name, metric in load_gold(run.data.gold).items():
        values = found[f"gold/{name}"] = []
        for start in range(0, len(prompts), judges.AT_ONCE):
            some = slice(start, start + judges.AT_ONCE)
            if world.is_main:
                values += _judged(name, metric(prompts[some], answers.texts[some]), count=len(prompts[some]))
            barrier()
    numbers = answers.numbers
    judged = {name: numbers[name] for name in ("normalized_score", "raw_score", "kl") if name in numbers}
    return replace(answers, numbers=judged | found | numbers)


def _judged(name: str, values: Sequence[float], *, count: int) -> list[float]:
    if len(values) != count:
        raise RunError(f"data.gold.{name} gave {len(values)} numbers for {count} responses; expected as many.")
    return [float(value) for value in values]


def judge(
    config: EvalConfig, answers: Mapping[str, Answers], *, prompts: tuple[str, ...], folder: Path, world: World
) -> dict[str, list[Verdict]]:
    """What every judge says of every pair, by judge, on the main rank; all ranks must call it."""
    if "baseline" not in answers:
        return {}
    pairs = Pairs(prompts, answers["model"].texts, answers["baseline"].texts)
    coin = judges.balanced_coin(len(pairs), seed=config.seed)
    functions = judges.load_judges(config.judges)
    verdicts: dict[str, list[Verdict]] = {}
    for name in config.judges:
        log.info("eval: %s judges", name)
        if name == REWARD:
            scores = (answers[side].numbers["raw_score"] for side in ("model", "baseline"))
            verdicts[name] = judges.judged_by_scores(*scores, pairs=pairs)
        elif name == HUMAN:
            verdicts[name] = person(folder).judge(pairs, coin=coin, seed=config.seed)
        else:
            ask = partial(judges.judged_by_function, name, functions[name], pairs=pairs)
            verdicts[name] = asked_of(ask, judges.questions(coin), world=world)
    return verdicts


def asked_of(
    ask: Callable[..., list[Verdict]], questions: Sequence[Sequence[tuple[int, bool]]], *, world: World
) -> list[Verdict]:
    """The answers of a function to all questions, on the main rank; the others wait for every single call.

    So a judge may take hours over all of them, and no rank is taken for one that hangs.
    """
    verdicts = []
    for asked in questions:
        verdicts += ask(asked=asked) if world.is_main else []
        barrier()
    return verdicts


def person(folder: Path) -> Person:
    """Whoever sits at this terminal, or has piped lines in."""
    folder.mkdir(parents=True, exist_ok=True)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    return Person(read=sys.stdin.readline, write=write, journal=JsonlLog(folder / JUDGEMENTS, steps=False))


def results_of(
    config: EvalConfig,
    answers: Mapping[str, Answers],
    *,
    scores: PairScores | None,
    verdicts: Mapping[str, Sequence[Verdict]],
) -> dict[str, Any]:
    """What goes into `results.json`."""
    model, baseline = answers["model"], answers.get("baseline")
    lengths = [] if baseline is None else list(zip(model.numbers["length"], baseline.numbers["length"], strict=True))
    plain = as_plain(config)
    settings = ("name", "model", "baseline", "reference", "reward", "max_response_tokens", "sampling", "seed")
    quality = None
    if scores is not None and scores.chosen:
        quality = reward_model_quality(scores.chosen, scores.rejected, subsets=scores.subsets, seed=config.seed)
    return {
        **{name: plain[name] for name in settings},
        "prompts": len(model.texts),
        "intervals": "95%: Wilson's for shares, else the percentiles of a bootstrap over rows",
        "measures": measures(model, baseline, seed=config.seed),
        "judges": {name: win_rate(found, lengths=lengths) for name, found in verdicts.items()},
        "reward_model": quality,
    }


def sample_rows(
    prompts: Sequence[str], answers: Mapping[str, Answers], *, verdicts: Mapping[str, Sequence[Verdict]]
) -> Iterable[dict[str, Any]]:
    """One row for each prompt: what each model has said, all numbers of it, and what each judge thinks."""
    preferences = {name: outcomes_by_pair(found, count=len(prompts)) for name, found in verdicts.items()}
    for row, prompt in enumerate(prompts):
        said = {
            side: {"response": found.texts[row], **{name: values[row] for name, values in found.numbers.items()}}
            for side, found in answers.items()
        }
        yield {"prompt": prompt, **said, "preferences": {name: values[row] for name, values in preferences.items()}}


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]], *, indent: int | None = None) -> None:
    """Write each row as JSON, the whole file or nothing; raises RunError where the disk is full."""
    lines = (json.dumps(valid_json(row), ensure_ascii=False, allow_nan=False, indent=indent) for row in rows)
    write_text(path, "".join(f"{line}\n" for line in lines))


def send(run: RunConfig, results: Mapping[str, Any], *, samples: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Give W&B the means, and every answer with its numbers; an evaluation of the same name goes on in the same run."""
    to = start_wandb(
        folder,
        root=Path(run.output_dir),
        stage=FOLDER,
        config=run.tracking,
        run_name=run.name,
        run_config=as_plain(run),
    )
    if to is None:
        return
    to.summary(summary_of(results))
    sides = ((row, side) for row in samples for side in ("model", "baseline") if side in row)
    to.samples(0, [{"side": side, "prompt": row["prompt"], **row[side]} for row, side in sides])
    to.finish(failed=False)


def show(results: Mapping[str, Any], folder: Path) -> None:
    """Print the results as tables."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    for found in tables(results, meanings=False):
        shown = table(found.title, found.columns, rows=found.rows)
        log.info("%s\n%s", shown, textwrap.fill(found.note, width, break_long_words=False))
    log.info("everything is in %s", folder)
