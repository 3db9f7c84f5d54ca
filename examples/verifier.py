"""Rewards that a program can check: the form of a response, and whether its answer is right.

    python run_pipeline.py stage=grpo 'data.ppo.train=[sums.jsonl]' \
        'ppo.rewards=[examples/verifier.py:correct,{source: examples/verifier.py:formatted, weight: 0.2}]'

A row of `sums.jsonl` is such as {"prompt": "2 + 2 =", "answer": "4"}: its further columns come by their names. A
response is text, or a list with one message where the prompts are conversations. See also: docs/rewards.md.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

THINKS = re.compile(r"<think>(?!.*<think>).*?</think>.*", re.DOTALL)


def formatted(completions: list[Any], **kwargs: Any) -> list[bool]:
    """1 for a response that thinks once, in <think> and </think>, and begins with that."""
    return [THINKS.fullmatch(text_of(completion)) is not None for completion in completions]


def correct(completions: list[Any], answer: list[Any], **kwargs: Any) -> list[bool | None]:
    """1 for the right answer; None, which does not count, for a prompt to which there is none in the data."""
    return [
        None if right is None else same(given_answer(text_of(completion)), str(right))
        for completion, right in zip(completions, answer, strict=True)
    ]


def text_of(completion: Any) -> str:
    """The text of a response, of either kind."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def given_answer(text: str) -> str:
    r"""What follows the thoughts, or in it the last \boxed{...}, or else the last line."""
    said = text.rpartition("</think>")[2].strip()
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", said)
    return (boxed[-1] if boxed else said.rpartition("\n")[2]).strip()


def same(given: str, right: str) -> bool:
    """Whether two answers are the same number, or else the same text but for case, spaces and a full stop."""
    plain = [" ".join(text.lower().replace(",", "").split()).rstrip(".") for text in (given, right)]
    try:
        return Decimal(plain[0]) == Decimal(plain[1])  # 4 is 4.0
    except InvalidOperation:
        return plain[0] == plain[1]
