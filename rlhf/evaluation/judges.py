"""Who says which of two responses is better: the reward model, a person in the terminal, or functions of the user's.

A function is called with the prompts, the responses shown as A, and those shown as B, three sequences of equally many
texts, and returns one preference for each prompt: "a", "b" or "tie", or a number from -1 (B is better) through 0 (a
tie) to 1 (A is better). It is called for both orders of every pair, a few pairs at a time, so that what it thinks of
the place of a response, rather than of the response, cancels, and is measured (Wang et al. 2023, arXiv:2305.17926).
Its module is installed, part of this project, or in the folder where the run was started.

Nobody is told which model wrote what. A person is asked once for a pair, in an order that a seeded coin has drawn, as
often one as the other. Left out: more than two responses at once, several people, and what is asked beside preference.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.evaluation.metrics import imported
from rlhf.runtime.errors import RunError
from rlhf.tracking.jsonl_log import JsonlLog
from rlhf.tracking.text_table import printable

REWARD, HUMAN = "reward", "human"
JudgeFunction = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[Any]]
"""Prompts, responses A, responses B -> one preference each."""

AT_ONCE = 32
"""Pairs that a function is given in one call."""
_WORDS = {"a": 1.0, "b": -1.0, "tie": 0.0}
_CALLED = (
    "called with the prompts, the responses A and the responses B and returning for each prompt a, b, tie or a number "
    "from -1 (B is better) to 1 (A is better)"
)


@dataclass(frozen=True)
class Pairs:
    """What two models said to the same prompts."""

    prompts: tuple[str, ...]
    model: tuple[str, ...]
    baseline: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def shown(self, row: int, *, model_is_a: bool) -> tuple[str, str]:
        """The responses A and B."""
        return (self.model[row], self.baseline[row]) if model_is_a else (self.baseline[row], self.model[row])

    def digest(self, row: int) -> str:
        """What a pair is known by: judged once, it need not be judged again, whatever run it turns up in."""
        parts = (self.prompts[row], self.model[row], self.baseline[row])
        text = "".join(f"{len(part)}:{part}" for part in parts)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Verdict:
    """An answer to one question: which of these two is better?"""

    row: int
    """Of the pair."""
    preference: float
    """From -1 (the other model's is better) through 0 (a tie) to 1 (the model's is better)."""
    model_is_a: bool | None = None
    """How the pair was shown; None where there is no first."""


def load_judges(names: Sequence[str]) -> dict[str, JudgeFunction]:
    """The functions among the judges, by name.

    Raises:
        ValueError: a judge that is none.
    """
    functions = {}
    for name in names:
        if name in (REWARD, HUMAN):
            continue
        if ":" not in name:
            raise ValueError(f"eval.judges: {name!r} is no judge; expected {REWARD}, {HUMAN}, or module:function.")
        functions[name] = imported(name, f"eval.judges: {name!r}", called=_CALLED)
    return functions


def balanced_coin(count: int, *, seed: int) -> list[bool]:
    """For each of `count` pairs whether the model's response is A: for half of them, drawn with `seed`."""
    coin = [row % 2 == 0 for row in range(count)]
    random.Random(seed).shuffle(coin)
    return coin


def judged_by_scores(model: Sequence[float], baseline: Sequence[float], *, pairs: Pairs) -> list[Verdict]:
    """The higher score is better; a pair with a score that is not finite is not judged.

    Equal responses tie, whatever their scores: in 16 bits these depend on what else stood in the batch.
    """
    scores = enumerate(zip(model, baseline, strict=True))
    return [
        Verdict(row, 0.0 if pairs.model[row] == pairs.baseline[row] else float((ours > theirs) - (ours < theirs)))
        for row, (ours, theirs) in scores
        if math.isfinite(ours) and math.isfinite(theirs)
    ]


def questions(coin: Sequence[bool]) -> list[list[tuple[int, bool]]]:
    """Both orders of every pair, the coin's first, a few at a time: row, and whether the model's response is A."""
    asked = [(row, side ^ turned) for turned in (False, True) for row, side in enumerate(coin)]
    return [asked[start : start + AT_ONCE] for start in range(0, len(asked), AT_ONCE)]


def judged_by_function(
    name: str, function: JudgeFunction, *, pairs: Pairs, asked: Sequence[tuple[int, bool]]
) -> list[Verdict]:
    """What a function says of some of the `questions`.

    Args:
        name: of the judge, for messages.
        function: what is called.
        pairs: what it is asked about.
        asked: rows and orders.

    Raises:
        RunError: it returned something that is no list of preferences.
    """
    shown = [pairs.shown(row, model_is_a=model_is_a) for row, model_is_a in asked]
    prompts = [pairs.prompts[row] for row, _ in asked]
    answers = function(prompts, [first for first, _ in shown], [second for _, second in shown])
    preferences = preferences_of(answers, count=len(asked), name=name)
    return [
        Verdict(row, _of_model(preference, model_is_a), model_is_a)
        for (row, model_is_a), preference in zip(asked, preferences, strict=True)
    ]


def _of_model(preference: float, model_is_a: bool) -> float:
    """A preference for A as one for the model."""
    return preference if model_is_a or preference == 0 else -preference


def preferences_of(answers: Any, *, count: int, name: str) -> list[float]:
    """What a function returned, as numbers from -1 (B is better) to 1 (A is better).

    Raises:
        RunError: it is no list of `count` preferences.
    """
    expected = f"expected {count} preferences, each a, b, tie or a number from -1 (B is better) to 1 (A is better)"
    if isinstance(answers, str | bytes | dict):
        raise RunError(f"judge {name} returned a {type(answers).__name__}; {expected}.")
    try:
        listed = list(answers)
    except TypeError as error:
        raise RunError(f"judge {name} returned {_short(answers)}; {expected}.") from error
    if len(listed) != count:
        raise RunError(f"judge {name} returned {len(listed)} answers to {count} pairs; {expected}.")
    numbers = [_preference(answer) for answer in listed]
    for place, (answer, value) in enumerate(zip(listed, numbers, strict=True)):
        if value is None:
            raise RunError(f"judge {name} returned {_short(answer)} for pair {place} of {count}; {expected}.")
    return [value for value in numbers if value is not None]


def _preference(answer: Any) -> float | None:
    """None for what is no preference."""
    if isinstance(answer, str):
        return _WORDS.get(answer.strip().lower())
    if isinstance(answer, bool) or answer is None:
        return None
    try:
        value = float(answer)  # numbers of numpy and tensors of one element, too
    except (TypeError, ValueError, RuntimeError):
        return None
    return value if abs(value) <= 1 else None  # NaN is not


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Person:
    """Somebody at a terminal, or lines piped in."""

    read: Callable[[], str]
    """The next line; empty where there are no more."""
    write: Callable[[str], object]
    """Shows some text."""
    journal: JsonlLog
    """What was said so far, in this run and in those before."""

    def judge(self, pairs: Pairs, *, coin: Sequence[bool], seed: int) -> list[Verdict]:
        """Ask about every pair that was not judged before, until all are or the person has had enough.

        Equal responses are a tie that nobody is asked about. The order is drawn with `seed`, so that the pairs that
        were judged are a fair sample of all, however early the person stops.
        """
        known = self._known(pairs)
        equal = [row for row in range(len(pairs)) if pairs.model[row] == pairs.baseline[row]]
        known |= {row: Verdict(row, 0.0) for row in equal}
        left = [row for row in range(len(pairs)) if row not in known]
        random.Random(seed).shuffle(left)
        if left:
            self.write(f"{len(left)} pairs to judge: a or b for the better response, t for a tie, q to stop.\n")
        for number, row in enumerate(left, start=1):
            self.write(_question(pairs, row, model_is_a=coin[row], number=f"{number} of {len(left)}"))
            answer = self._answer()
            if answer is None:
                break
            known[row] = Verdict(row, _of_model(_WORDS[answer], coin[row]), coin[row])
            self._note(pairs, known[row])
        return [known[row] for row in sorted(known)]

    def _answer(self) -> str | None:
        """`a`, `b` or `tie`; None for the end."""
        while True:
            self.write("better: [a/b/t/q] ")
            line = self.read()
            word = line.strip().lower()
            if not line or word in ("q", "quit"):
                self.write("\n")
                return None
            if word in ("a", "b", "t", "tie"):
                return "tie" if word == "t" else word
            self.write(f"{printable(line.strip())[:40]!r} is no answer. ")

    def _known(self, pairs: Pairs) -> dict[int, Verdict]:
        self.journal.repair()
        said = {row["pair"]: row for row in self.journal.rows() if "pair" in row and "preference" in row}
        rows = {row: said[digest] for row in range(len(pairs)) if (digest := pairs.digest(row)) in said}
        return {row: Verdict(row, float(old["preference"]), old.get("model_is_a")) for row, old in rows.items()}

    def _note(self, pairs: Pairs, verdict: Verdict) -> None:
        row = verdict.row
        self.journal.append(
            {
                "pair": pairs.digest(row),
                "preference": verdict.preference,
                "model_is_a": verdict.model_is_a,
                "prompt": pairs.prompts[row],
                "model": pairs.model[row],
                "baseline": pairs.baseline[row],
            }
        )


def _question(pairs: Pairs, row: int, *, model_is_a: bool, number: str) -> str:
    """What a person sees; every line of a text is set in, so that none can pass for another part."""
    first, second = pairs.shown(row, model_is_a=model_is_a)
    parts = {f"\n--- {number}: prompt": pairs.prompts[row], "--- A": first, "--- B": second}
    return "".join(f"{title}\n{_set_in(text)}\n" for title, text in parts.items())


def _set_in(text: str) -> str:
    return "\n".join(f"  | {printable(line)}" for line in text.split("\n"))
