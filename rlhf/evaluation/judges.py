"""Judges say which of two responses is better: the reward model, a person in the terminal, or functions of the user's.

A function is called with the prompts, the responses shown as A and those shown as B, three sequences of equal length,
and returns one preference per prompt: "a", "b" or "tie", or a number from -1 (B is better) through 0 (a tie) to 1 (A is
better). It judges every pair in both orders, a few pairs per call, so a preference for a position rather than for a
response cancels, and is measured (Wang et al. 2023, arXiv:2305.17926).

No judge is told which model wrote what. A person judges each pair once; a seeded shuffle decides which response is A,
the model's for half of the pairs. Left out: more than two responses at once, several people, other questions.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TextIO

from rlhf.runtime.errors import RunError
from rlhf.runtime.user_functions import load_function
from rlhf.tracking.jsonl_log import JsonlLog
from rlhf.tracking.text_table import printable, printable_lines

REWARD, HUMAN = "reward", "human"
JudgeFunction = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[Any]]
"""Prompts, responses A, responses B -> one preference each."""

PAIRS_PER_CALL = 32
"""Pairs that a function of the user's is given in one call."""
_WORDS = {"a": 1.0, "b": -1.0, "tie": 0.0}
_PREFERENCE = "a, b, tie or a number from -1 (B is better) to 1 (A is better)"


@dataclass(frozen=True)
class Pairs:
    """Responses of two models to the same prompts."""

    prompts: tuple[str, ...]
    model: tuple[str, ...]
    baseline: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def shown(self, row: int, *, model_is_a: bool) -> tuple[str, str]:
        """The responses A and B."""
        return (self.model[row], self.baseline[row]) if model_is_a else (self.baseline[row], self.model[row])

    def digest(self, row: int) -> str:
        """Identifies the texts of a pair, so that a judgement on them can be found again in any run."""
        parts = (self.prompts[row], self.model[row], self.baseline[row])
        text = "".join(f"{len(part)}:{part}" for part in parts)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Question(NamedTuple):
    """A pair in one of its two orders."""

    row: int
    model_is_a: bool


@dataclass(frozen=True)
class Judgement:
    """A judge's answer about one pair."""

    row: int
    preference: float
    """From -1 (the baseline's response is better) through 0 (a tie) to 1 (the model's is better)."""
    model_is_a: bool | None = None
    """How the pair was shown; None if no response came first."""

    @classmethod
    def of(cls, question: Question, preference_for_a: float) -> Judgement:
        """Turn a preference for A into one for the model."""
        sign = 1 if question.model_is_a or preference_for_a == 0 else -1  # without a negative zero
        return cls(question.row, sign * preference_for_a, question.model_is_a)


def load_judges(names: Sequence[str]) -> dict[str, JudgeFunction]:
    """Import the judges that are functions.

    Raises:
        ValueError: a name is neither a known judge nor a function.
    """
    signature = (
        f"called with the prompts, the responses A and the responses B and returning for each prompt {_PREFERENCE}"
    )
    functions = {}
    for name in (name for name in names if name not in (REWARD, HUMAN)):
        if ":" not in name:
            raise ValueError(f"eval.judges: {name!r} is no judge; expected {REWARD}, {HUMAN}, or module:function.")
        functions[name] = load_function(name, f"eval.judges: {name!r}", signature=signature)
    return functions


def random_order(count: int, *, seed: int) -> list[Question]:
    """Each of `count` pairs once; the model's response is A in a random half of them."""
    model_is_a = [row % 2 == 0 for row in range(count)]
    random.Random(seed).shuffle(model_is_a)
    return [Question(row, first) for row, first in enumerate(model_is_a)]


def both_orders(questions: Sequence[Question]) -> list[list[Question]]:
    """The questions and then the same in the other order, in lists of `PAIRS_PER_CALL`."""
    everything = [*questions, *(Question(row, not model_is_a) for row, model_is_a in questions)]
    return [everything[start : start + PAIRS_PER_CALL] for start in range(0, len(everything), PAIRS_PER_CALL)]


def judge_by_scores(model: Sequence[float], baseline: Sequence[float], *, pairs: Pairs) -> list[Judgement]:
    """The higher score is better; a pair with a score that is not finite is not judged.

    Equal responses are a tie, whatever their scores: computed in batches of other shapes, these may differ by rounding.
    """
    return [
        Judgement(row, 0.0 if pairs.model[row] == pairs.baseline[row] else float((ours > theirs) - (ours < theirs)))
        for row, (ours, theirs) in enumerate(zip(model, baseline, strict=True))
        if math.isfinite(ours) and math.isfinite(theirs)
    ]


def judge_by_function(
    name: str, function: JudgeFunction, *, pairs: Pairs, questions: Sequence[Question]
) -> list[Judgement]:
    """Call a function with some pairs.

    Raises:
        RunError: it returned something other than a list of preferences.
    """
    shown = [pairs.shown(row, model_is_a=model_is_a) for row, model_is_a in questions]
    prompts = [pairs.prompts[row] for row, _ in questions]
    answers = function(prompts, [first for first, _ in shown], [second for _, second in shown])
    preferences = parse_preferences(answers, count=len(questions), name=name)
    return [Judgement.of(question, value) for question, value in zip(questions, preferences, strict=True)]


def parse_preferences(answers: Any, *, count: int, name: str) -> list[float]:
    """What a function returned, as numbers from -1 (B is better) to 1 (A is better).

    Raises:
        RunError: it is not a list of `count` preferences.
    """
    expected = f"expected {count} preferences, each {_PREFERENCE}"
    if not isinstance(answers, Iterable) or isinstance(answers, str | bytes | dict):
        raise RunError(f"judge {name} returned {answers!r:.60}; {expected}.")
    listed = list(answers)
    if len(listed) != count:
        raise RunError(f"judge {name} returned {len(listed)} answers to {count} pairs; {expected}.")
    preferences = [_WORDS.get(answer.strip().lower()) if isinstance(answer, str) else answer for answer in listed]
    numbers = [_number(preference) for preference in preferences]
    for place, (answer, number) in enumerate(zip(listed, numbers, strict=True)):
        if not abs(number) <= 1:  # so that NaN is refused
            raise RunError(f"judge {name} returned {answer!r:.60} for pair {place} of {count}; {expected}.")
    return numbers


def _number(answer: Any) -> float:
    """A number, also of numpy or in a tensor of one element; NaN for anything else."""
    try:
        return math.nan if isinstance(answer, bool) else float(answer)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


@dataclass(frozen=True)
class HumanJudge:
    """A person at a terminal, or lines piped in."""

    stdin: TextIO
    stdout: TextIO
    log: JsonlLog
    """The judgements of this run and of those before."""

    def judge(self, pairs: Pairs, *, questions: Sequence[Question], seed: int) -> list[Judgement]:
        """Ask about every pair that has no judgement yet, until all have one or the person stops.

        Equal responses are a tie without a question. The order of the questions is shuffled with `seed`, so wherever
        the person stops, the judged pairs are a fair sample of all.
        """
        known = self._known(pairs)
        known |= {row: Judgement(row, 0.0) for row in range(len(pairs)) if pairs.model[row] == pairs.baseline[row]}
        left = [question for question in questions if question.row not in known]
        random.Random(seed).shuffle(left)
        if left:
            self.stdout.write(f"{len(left)} pairs to judge: a or b for the better response, t for a tie, q to stop.\n")
        for number, question in enumerate(left, start=1):
            self.stdout.write(_question_text(pairs, question, number=f"{number} of {len(left)}"))
            preference = self._answer()
            if preference is None:
                break
            row, judged = question.row, Judgement.of(question, preference)
            known[row] = judged
            kept = {"preference": judged.preference, "model_is_a": judged.model_is_a}
            texts = {"prompt": pairs.prompts[row], "model": pairs.model[row], "baseline": pairs.baseline[row]}
            self.log.append({"pair": pairs.digest(row), **kept, **texts})
        return [known[row] for row in sorted(known)]

    def _answer(self) -> float | None:
        """A preference for A; None where the person stops."""
        while True:
            self.stdout.write("better: [a/b/t/q] ")
            self.stdout.flush()
            line = self.stdin.readline()
            word = line.strip().lower()
            if not line or word in ("q", "quit"):
                self.stdout.write("\n")
                return None
            if word in ("a", "b", "t", "tie"):
                return _WORDS["tie" if word == "t" else word]
            self.stdout.write(f"{printable(line.strip())[:40]!r} is no answer. ")

    def _known(self, pairs: Pairs) -> dict[int, Judgement]:
        """The judgements of earlier runs on these very texts, by row."""
        self.log.repair()
        logged = {row["pair"]: row for row in self.log.rows()}
        found = {row: logged[digest] for row in range(len(pairs)) if (digest := pairs.digest(row)) in logged}
        return {row: Judgement(row, float(old["preference"]), old["model_is_a"]) for row, old in found.items()}


def _question_text(pairs: Pairs, question: Question, *, number: str) -> str:
    """What a person sees; every line of a text is indented, so that none can pass for a heading."""
    first, second = pairs.shown(question.row, model_is_a=question.model_is_a)
    parts = {f"\n--- {number}: prompt": pairs.prompts[question.row], "--- A": first, "--- B": second}
    indented = {title: printable_lines(text).replace("\n", "\n  | ") for title, text in parts.items()}
    return "".join(f"{title}\n  | {text}\n" for title, text in indented.items())
