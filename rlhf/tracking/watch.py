"""Signs that a stage goes wrong, in words: a reward model that judges nothing, reward hacking, runaway KL, and others.

Every check looks at one row after the other, and at the answers to held-out prompts, the same prompts every time. What
is said while a stage runs and what its report says come from the same checks over the same rows, so they cannot differ.
Left out: where and when it is said (`report/page.py`, `lookout.py`), and stopping a run, which is a person's decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import NormalDist

from rlhf.algorithms.intervals import Z, wilson
from rlhf.tracking.answer_statistics import (
    SMALLEST_SAMPLE,
    Row,
    by_step,
    change,
    degenerate_share,
    endless_share,
    is_number,
    length_correlation,
    repeated_share,
    with_ends,
)
from rlhf.tracking.metric_registry import ALL, PPO, REWARD
from rlhf.tracking.text_table import number

KL_PER_TOKEN = 1.0  # nats: on average, a token is e times as likely as under the reference
ENTROPY_SHARE = 0.1  # of what it was at the start
SMALL_DEVIATION = 0.1  # of two responses that far apart, a reward model prefers one with probability 0.525
CORRELATED = 0.5
REPEATED = 0.2  # of the responses


class State(StrEnum):
    """What came of a check."""

    fine = "fine"
    wrong = "wrong"
    unchecked = "unchecked"


@dataclass(frozen=True)
class Check:
    """Something that is looked for."""

    stages: tuple[str, ...]
    fine: str
    """What may be said where it was looked for and not found."""
    needs: str
    """Why it was not looked for, where no row says more."""


_TWICE = "it takes two evaluations of the same held-out prompts"
_JUDGE = "the held-out results of the reward model are not known"
CHECKS = {
    "not_finite": Check(ALL, "all numbers are finite", "nothing was logged"),
    "coin": Check((*REWARD, *PPO), "the reward model is better than a coin on held-out pairs", _JUDGE),
    "flat": Check((*REWARD, *PPO), "the reward model's scores differ", _JUDGE),
    "clamp": Check(PPO, "few scores are at the clamp", "no scores were logged"),
    "kl": Check(PPO, "KL has not run away", "no KL was logged"),
    "entropy": Check(PPO, "entropy has not collapsed", "it takes two rows with an entropy"),
    "not_risen": Check(PPO, "the score has risen", "it takes held-out answers from before training and its end"),
    "raw_fell": Check(PPO, "the raw score has not fallen while the score rose", _TWICE),
    "parted": Check(PPO, "score and gold metric have not parted", _TWICE),
    "length": Check(PPO, "longer answers are not scored higher", "no held-out prompts were answered"),
    "repeats": Check(PPO, "answers have not become repetitive", _TWICE),
    "degenerate": Check(PPO, "answers have not fallen apart", _TWICE),
    "endless": Check(PPO, "answers have not become endless", _TWICE),
}
_OF_ANSWERS = ("not_risen", "raw_fell", "parted", "length", "repeats", "degenerate", "endless")


@dataclass(frozen=True)
class Finding:
    """What a check says of one row."""

    name: str
    """A key of `CHECKS`; where there is one finding for each metric, `parted:METRIC`."""
    state: State
    text: str = ""
    """What is wrong and what it may mean, or why it was not checked."""


@dataclass(frozen=True)
class Verdict(Finding):
    """What a check says of a whole stage: what was wrong once stays, with the newest text."""

    first: int = 0
    """Step at which it was first wrong."""
    last: int = 0
    """Step at which it was last wrong."""
    holds: bool = False
    """Whether it was still wrong when it was last looked for."""

    def after(self, finding: Finding, step: int) -> Verdict:
        """The verdict with one more finding."""
        if finding.state is State.wrong:
            first = self.first if self.state is State.wrong else step
            return Verdict(self.name, State.wrong, finding.text, first=first, last=step, holds=True)
        if finding.state is State.unchecked:
            return self if self.state is not State.unchecked else replace(self, text=finding.text)
        return replace(self, holds=False) if self.state is State.wrong else Verdict(self.name, State.fine)


def history(stage: str, rows: Sequence[Row], *, samples: Sequence[Row], total_steps: float = math.inf) -> list[Verdict]:
    """What every check of `stage` says of all that it has logged.

    Args:
        stage: sft, reward, ppo or another policy stage.
        rows: of `metrics.jsonl`, oldest first.
        samples: of `samples.jsonl`: the answers of every evaluation to the same prompts, in the same order.
        total_steps: of the stage, as far as they are known.
    """
    watcher, answers = Watcher(total_steps), by_step(samples)
    checks = {name: check for name, check in CHECKS.items() if stage in check.stages}
    verdicts = {name: Verdict(name, State.unchecked, check.needs) for name, check in checks.items()}
    for row in rows:
        for found in watcher.look(row, answers.get(row["step"], [])):
            earlier = verdicts.get(found.name, Verdict(found.name, State.unchecked))
            verdicts[found.name] = earlier.after(found, row["step"])
    by_metric = {name.partition(":")[0] for name in verdicts if ":" in name}
    return [found for name, found in verdicts.items() if name not in by_metric and name.partition(":")[0] in checks]


@dataclass(frozen=True)
class _Best:
    """The evaluation with the highest gold metric so far."""

    step: int
    value: float
    answers: Sequence[Row]


class Watcher:
    """Looks at the rows of one stage, oldest first; a step costs the same however long the stage."""

    def __init__(self, total_steps: float) -> None:
        """Some things are looked for at the end alone, after `total_steps`."""
        self._total_steps = total_steps
        self._entropy: float | None = None
        self._bad, self._skipped = "", 0.0
        self._first: Sequence[Row] = ()
        self._best: dict[str, _Best] = {}
        self._seen: dict[str, int] = {}  # evaluations with the metric

    def look(self, row: Row, answers: Sequence[Row] = ()) -> list[Finding]:
        """What can be said after one more row.

        Args:
            row: of `metrics.jsonl`.
            answers: to the held-out prompts at its step, which count if the row is that of an evaluation.
        """
        found = [self._not_finite(row), *self._reward_model(row), *_clamp(row), *_kl(row), *self._entropy_of(row)]
        if "eval/score" in row:
            found += self._evaluated(row, answers)
        return found

    def _not_finite(self, row: Row) -> Finding:
        bad = [key for key in row if "/" in key and not _is_right(row, key)]
        skipped = _total(row, "skipped_steps") - _total(row, "scale_search_steps")
        self._skipped += skipped
        if bad and not self._bad:
            self._bad = f"{bad[0]} was not finite at step {row['step']}"
        texts = [self._bad] if self._bad else []
        if self._skipped:
            count = number(int(self._skipped))
            texts.append(f"{count} optimizer steps were skipped for a gradient that was not finite")
        advice = "Lower the learning rate, or set engine.precision=fp32."
        return _finding("not_finite", f"{'; '.join(texts)}. {advice}" if bad or skipped else "")

    def _reward_model(self, row: Row) -> Iterator[Finding]:
        """Of the last row of its own stage, and of the first of PPO, which repeats what that stage has left."""
        is_its_end = row["step"] >= self._total_steps and "eval/score_std" in row
        family = "eval" if is_its_end else "reward_model"
        accuracy, pairs, deviation = (row.get(f"{family}/{name}") for name in ("accuracy", "pairs", "score_std"))
        if is_number(accuracy) and is_number(pairs):
            share = wilson(accuracy * pairs, int(pairs))
            text = (
                f"The reward model ranks {share.mean:.0%} of {number(int(pairs))} held-out pairs right (95% interval "
                f"{share.low:.0%} to {share.high:.0%}): as far as they tell it is no better than a coin, and PPO would "
                "learn noise. Train it on more or cleaner pairs, for longer, or from a larger model, before PPO."
            )
            yield _finding("coin", text if not share.low > 0.5 else "")
        if is_number(deviation):
            text = (
                f"The reward model's scores of held-out responses deviate by {number(deviation)}, so it scores them "
                "nearly alike; ppo.score.normalize divides by that, and PPO would be paid for noise. Train it for "
                "longer, or with a higher learning rate, before PPO."
            )
            yield _finding("flat", text if deviation < SMALL_DEVIATION else "")

    def _entropy_of(self, row: Row) -> Iterator[Finding]:
        last = row.get("objective/entropy")
        if not is_number(last):
            return
        if self._entropy is None:
            self._entropy = last
            return
        text = (
            f"Entropy fell from {number(self._entropy)} to {number(last)} nats per token by step {row['step']}: the "
            "policy says nearly the same thing every time and explores no more. Raise ppo.kl.coef, or lower ppo's "
            "learning rate."
        )
        yield _finding("entropy", text if last < ENTROPY_SHARE * self._entropy else "")

    def _evaluated(self, row: Row, answers: Sequence[Row]) -> Iterator[Finding]:
        keys = [key for key, value in row.items() if key.startswith("gold/") and is_number(value)]
        if not keys:
            yield Finding("parted", State.unchecked, "data.gold names no metric that no model was trained on")
        if len(answers) < SMALLEST_SAMPLE:
            names = [name for name in _OF_ANSWERS if keys or name != "parted"]
            why = f"there are answers to {len(answers)} held-out prompts, and fewer than {SMALLEST_SAMPLE} tell nothing"
            yield from (Finding(name, State.unchecked, why) for name in names)
            return
        yield _length(answers)
        for key in keys:
            yield from self._parted(row, answers, key=key)
        if self._first:
            yield _raw_fell(self._first, answers, step=row["step"])
            yield from (_risen(self._first, answers, step=row["step"], share=share) for share in _SHARES)
            if row["step"] >= self._total_steps:
                yield _not_risen(self._first, answers, step=row["step"])
        self._first = self._first or answers

    def _parted(self, row: Row, answers: Sequence[Row], *, key: str) -> Iterator[Finding]:
        """Proxy up and gold down since the best gold: the picture of Gao et al. 2023, figure 1."""
        best, seen = self._best.get(key), self._seen.get(key, 0) + 1
        self._seen[key] = seen
        if best is None or row[key] > best.value:
            self._best[key] = _Best(row["step"], row[key], answers)
        if best is not None:
            yield _parted(row, answers, key=key, best=best if row[key] <= best.value else None, seen=seen)


def _finding(name: str, text: str) -> Finding:
    return Finding(name, State.wrong if text else State.fine, text)


def _is_right(row: Row, key: str) -> bool:
    """Whether a value is finite, or the norm of a gradient that overflowed while fp16 looked for its loss scale."""
    model, _, name = key.partition("/")
    return is_number(row[key]) or (name == "grad_norm" and bool(row.get(f"{model}/scale_search_steps")))


def _total(row: Row, name: str) -> float:
    """The sum of a count over models; those that share a loss scale count the same steps."""
    counts = [value for key, value in row.items() if key.endswith(f"/{name}") and is_number(value)]
    shared = {"actor/loss_scale", "critic/loss_scale"} <= row.keys()
    return max(counts, default=0.0) if shared else sum(counts)


def _clamp(row: Row) -> Iterator[Finding]:
    for key, what in (("eval/clamped", "held-out answers"), ("objective/clamped", "responses")):
        share = row.get(key)
        if is_number(share):
            text = (
                f"{share:.0%} of the {what} at step {row['step']} are scored at the limit, ppo.score.clamp: PPO cannot "
                "tell which of them is better. Raise ppo.score.clamp, or look at the deviation of its scores."
            )
            yield _finding("clamp", text if share > REPEATED else "")
            return


def _kl(row: Row) -> Iterator[Finding]:
    value = row.get("objective/kl_per_token")
    if is_number(value):
        text = (
            f"KL to the reference is {number(value)} nats per token at step {row['step']}: the policy has run away "
            "from the reference, where the reward model was not trained to judge. Raise ppo.kl.coef, or lower ppo's "
            "learning rate."
        )
        yield _finding("kl", text if value > KL_PER_TOKEN else "")


def _parted(row: Row, answers: Sequence[Row], *, key: str, best: _Best | None, seen: int) -> Finding:
    """Whether gold has fallen since the best of the `seen` evaluations, which is the luckiest of many.

    So the 5 % of a false alarm are those of a whole stage: the k-th evaluation has 1 / (k (k - 1)) of them, which sum
    to 1, and shares them between the k - 1 before it.
    """
    name, step = f"parted:{key}", row["step"]
    if best is None:
        return Finding(name, State.fine)
    gold, proxy = (change(best.answers, answers, key=column) for column in (key, "score"))
    if gold is None or proxy is None:
        return Finding(name, State.unchecked, f"fewer than {SMALLEST_SAMPLE} answers have a score and a {key}")
    wider = NormalDist().inv_cdf(1 - 0.025 / (seen * (seen - 1) ** 2)) / Z  # for a mean that is nearly normal
    if proxy.mean <= 0 or gold.mean + wider * (gold.high - gold.mean) >= 0:
        return Finding(name, State.fine)
    kl = row.get("eval/kl")
    fall = with_ends(-gold.mean, -gold.high, high=-gold.low)
    return Finding(
        name,
        State.wrong,
        f"From step {best.step} to step {step} the reward model's score rose by {number(proxy.mean)} while {key}, "
        f"which no model was trained on, fell by {fall} over {gold.count} prompts"
        f"{f', at a KL of {number(kl)} nats' if is_number(kl) else ''}: the policy has learnt what pleases the reward "
        f"model, not what it stands for. By {key} the policy of step {best.step} is the best; raise ppo.kl.coef, or "
        "stop there.",
    )


def _raw_fell(before: Sequence[Row], after: Sequence[Row], *, step: int) -> Finding:
    raw, score = (change(before, after, key=key) for key in ("raw_score", "score"))
    if raw is None or score is None:
        return Finding("raw_fell", State.unchecked, f"fewer than {SMALLEST_SAMPLE} answers have both scores")
    fall = with_ends(-raw.mean, -raw.high, high=-raw.low)
    text = (
        f"By step {step} the score that PPO is paid for rose by {number(score.mean)} while the reward model's own, "
        f"raw_score, fell by {fall} over {raw.count} held-out prompts: the rise "
        "comes from ppo.score (the penalty for answers that do not end, the clamp), not from better answers."
    )
    return _finding("raw_fell", text if raw.high < 0 < score.mean else "")


def _not_risen(before: Sequence[Row], after: Sequence[Row], *, step: int) -> Finding:
    found = change(before, after, key="score")
    if found is None:
        return Finding("not_risen", State.unchecked, f"fewer than {SMALLEST_SAMPLE} answers have a score")
    text = (
        f"The score of held-out answers has changed by {with_ends(found.mean, found.low, high=found.high)} over "
        f"{found.count} prompts from before training to its end at step {step}: as far as they tell it has not "
        "risen. Look at the reward model, at ppo.kl.coef and at the learning rates."
    )
    return _finding("not_risen", text if found.low <= 0 else "")


def _length(rows: Sequence[Row]) -> Finding:
    found = length_correlation(rows)
    if found is None:
        return Finding("length", State.unchecked, "all answers have the same length or the same score")
    text = (
        f"The longer a response, the higher its score (correlation {found:.2f} over {len(rows)} held-out prompts): "
        "part of the reward may be for length alone. Compare answers of equal length, or balance the preferences."
    )
    return _finding("length", text if found > CORRELATED else "")


@dataclass(frozen=True)
class _Share:
    """A share of the responses that should stay small."""

    name: str
    of: Callable[[Sequence[Row]], float]
    what: str
    why: str


def _risen(first: Sequence[Row], last: Sequence[Row], *, step: int, share: _Share) -> Finding:
    """Wrong where the share is large and has risen since the first evaluation."""
    before, after = share.of(first), share.of(last)
    seen = f"{after:.0%} of the {len(last)} held-out {share.what} at step {step} ({before:.0%} at first)"
    return _finding(share.name, f"{seen}: {share.why}." if after > max(REPEATED, before) else "")


_SHARES = (
    _Share(
        "repeats",
        of=repeated_share,
        what="responses are word for word that of another prompt",
        why="the policy has found an answer that pleases whatever the question is",
    ),
    _Share(
        "degenerate",
        of=degenerate_share,
        what="responses are empty or repeat themselves",
        why="the text is falling apart",
    ),
    _Share(
        "endless",
        of=endless_share,
        what="responses do not end by themselves",
        why="a longer response may be paid better than an end; see ppo.score.missing_eos_mode",
    ),
)
