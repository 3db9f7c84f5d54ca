"""Problems that a program generates and verifies: the tasks of reasoning-gym (`pip install -e ".[reasoning]"`).

`demonstrations` and `prompts` are data sources, `correct` and `formatted` reward functions. The problems to learn from
and those held out never overlap, whatever their seeds: the hash of a question says which of the two it belongs to.
A response ends with its answer in `<answer>` tags, as reasoning-gym extracts it. For sums there are two ways to get
there, and demonstrations show both: to guess the answer at once, or to work it out step by step.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

Problem = Mapping[str, Any]
Config = Mapping[str, Any]
"""Settings of a task, as reasoning-gym calls them."""

WORKED = "chain_sum"
"""The task whose steps can be written down."""
HELD_OUT = 8
"""One question in so many is held out."""
NUMBERS = 2**31
"""Problems of one seed."""
FRUITLESS = 10_000
"""Problems in a row that are not new, after which a task is taken to have no more."""
RESPONSE = re.compile(r"[^<>]*<answer>[^<>]+</answer>")


def demonstrations(
    task: str,
    size: int,
    *,
    split: str,
    worked_share: float = 0.0,
    seed: int = 0,
    config: Config | None = None,
) -> list[dict[str, str]]:
    """Rows `prompt` and `completion`, a share `worked_share` of them with the steps before the answer.

    Args:
        task: Name of a task of reasoning-gym; only `chain_sum` has steps.
        size: Rows, each with another problem.
        split: `train` or `test`, which share no problem.
        worked_share: 0 to 1.
        seed: Which problems, and which of them are worked out.
        config: Settings of the task, such as `min_terms`.

    Raises:
        ValueError: the task has no steps or too few problems, or reasoning-gym is not installed.
    """
    if worked_share and task != WORKED:
        raise ValueError(f"worked_share={worked_share}: only {WORKED} has steps, found {task}; expected 0.")
    draw = random.Random(seed)
    return [
        {"prompt": _prompt(problem), "completion": _response(problem, worked=draw.random() < worked_share)}
        for problem in _problems(task, size, split=split, seed=seed, config=config or {})
    ]


def prompts(task: str, size: int, *, split: str, seed: int = 0, config: Config | None = None) -> list[dict[str, str]]:
    """Rows `prompt` and `problem`, which is what the verifier needs, as JSON; arguments as for `demonstrations`."""
    return [
        {"prompt": _prompt(problem), "problem": json.dumps(problem)}
        for problem in _problems(task, size, split=split, seed=seed, config=config or {})
    ]


def correct(completions: Sequence[str], problem: Sequence[str], **_: Any) -> list[float]:
    """1 for each right answer by the task's own verifier, 0 for every other."""
    return [float(_is_correct(text, json.loads(entry))) for text, entry in zip(completions, problem, strict=True)]


def formatted(completions: Sequence[str], **_: Any) -> list[float]:
    """1 for each response that is an answer in tags, perhaps after its steps, and nothing else."""
    return [float(RESPONSE.fullmatch(text.strip()) is not None) for text in completions]


def _problems(task: str, size: int, *, split: str, seed: int, config: Config) -> Iterator[Problem]:
    """The first `size` different problems of a split, as reasoning-gym generates them."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: expected train or test, which is held out.")
    try:
        from reasoning_gym import create_dataset
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}; install the extra of these problems: pip install -e '.[reasoning]'.") from error

    # Problem `number` is drawn with seed + number: seeds far apart, or they would give the same problems, shifted.
    source = create_dataset(task, seed=seed * NUMBERS, size=NUMBERS, **config)
    seen: set[str] = set()
    number = last = 0
    while len(seen) < size:
        problem = source[number]
        number += 1
        question = problem["question"]
        if _is_held_out(question) == (split == "test") and question not in seen:
            seen.add(question)
            last = number
            yield problem
        elif number - last > FRUITLESS:
            raise ValueError(
                f"{task} with {dict(config)} has only {len(seen)} different problems; expected size={size}."
            )


def _is_held_out(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] % HELD_OUT == 0


def _prompt(problem: Problem) -> str:
    return f"{problem['question']}\n"


def _response(problem: Problem, *, worked: bool) -> str:
    steps = _running_sums(problem["metadata"]["expression"]) if worked else ""
    return f"{steps}<answer>{problem['answer']}</answer>"


def _running_sums(expression: str) -> str:
    """`4 - 1 - 7` as `4 - 1 = 3, 3 - 7 = -4`."""
    terms = expression.split()
    total, steps = int(terms[0]), []
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        step = f"{total} {sign} {term} = "
        total += int(sign + term)
        steps.append(f"{step}{total}")
    return ", ".join(steps)


def _is_correct(response: str, problem: Problem) -> bool:
    from reasoning_gym.utils import extract_answer

    return bool(_verifier(problem["metadata"]["source_dataset"])(extract_answer(response), problem) >= 1)


@cache
def _verifier(task: str) -> Any:
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(task)
