"""The checks that tell when a stage goes wrong: a useless reward model, reward hacking, runaway KL, and others.

`CHECKS`, at the end, is the table of them. Each looks at one logged row after the other, and at the answers to the
held-out prompts, which are the same every time. See also: `alerts.py`, which runs them. Left out: stopping a run.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rlhf.algorithms.intervals import Z, wilson
from rlhf.tracking.answer_statistics import (
    SMALLEST_SAMPLE,
    change,
    degenerate_share,
    endless_share,
    length_correlation,
    repeated_share,
)
from rlhf.tracking.jsonl_log import Row, is_number
from rlhf.tracking.metric_registry import ALL, DPO, PPO, REWARD
from rlhf.tracking.text_table import number, with_ends

KL_PER_TOKEN = 1.0  # nats: on average, a token is e times as likely as under the reference
ENTROPY_SHARE = 0.1  # of the entropy at the start
SMALL_DEVIATION = 0.1  # a reward model prefers one of two responses that far apart with probability 0.525
CORRELATED = 0.5
REPEATED = 0.2  # of the responses
_FEW_ROLLOUTS = 3


class Finding(NamedTuple):
    """The result of a check in one row."""

    is_wrong: bool | None
    """None if it could not be checked."""
    text: str = ""
    """The problem and what it may mean, or why it was not checked."""
    metric: str = ""
    """The gold metric, where there is one finding for each."""


@dataclass
class Seen:
    """The memory of the checks between rows; it does not grow with the stage."""

    total_steps: float
    """Some checks are made at the end alone, after this many steps."""
    answers: Sequence[Row] = ()
    """To the held-out prompts, at the step of the row that is checked."""
    first_answers: Sequence[Row] = ()
    """The answers of the first evaluation, from the second one on."""
    first_entropy: float | None = None
    first_bad: str = ""
    """The first number that was not finite, in words."""
    skipped_steps: float = 0.0
    has_scored: frozenset[str] = frozenset()
    """Reward sources that did not say None of everything."""
    best: dict[str, tuple[Row, Sequence[Row]]] = field(default_factory=dict)
    """Row and answers of the evaluation with the highest value of each gold metric."""
    evaluations: Counter[str] = field(default_factory=Counter)
    """How many evaluations had each gold metric."""

    @property
    def raw_score(self) -> str:
        """The column of the answers with the sum of the reward sources, or with the scores of the only one."""
        return next((key for key in (*self.answers, {})[0] if key.startswith(("raw_score", "reward/"))), "")


Look = Callable[[Row, Seen], Iterator[Finding]]


@dataclass(frozen=True)
class Check:
    """One thing that can go wrong."""

    stages: tuple[str, ...]
    look: Look
    """Yields what it finds in a row, or nothing."""
    fine: str
    """The claim that holds if nothing was found."""
    needs: str
    """Why it was not checked, if no row gives another reason."""
    evaluations: int = 0
    """How many evaluations with enough answers it takes: 0 looks at every row, 2 compares with the first one."""
    needs_gold: bool = False
    """Whether it takes a gold metric."""


def _finite(row: Row, seen: Seen) -> Iterator[Finding]:
    bad = [key for key in row if "/" in key and not _is_finite(row, key)]
    skipped = _count(row, "skipped_steps") - _count(row, "scale_search_steps")
    seen.skipped_steps += skipped
    if bad and not seen.first_bad:
        seen.first_bad = f"{bad[0]} was not finite at step {row['step']}"
    texts = [seen.first_bad] if seen.first_bad else []
    if seen.skipped_steps:
        texts.append(f"{int(seen.skipped_steps):,} optimizer steps were skipped for a gradient that was not finite")
    text = f"{'; '.join(texts)}. Lower the learning rate, or set engine.precision=fp32."
    yield Finding(bool(bad or skipped), text)


def _is_finite(row: Row, key: str) -> bool:
    """True for a finite value, and for the norm of a gradient that overflowed while fp16 searched its loss scale."""
    model, _, name = key.partition("/")
    return is_number(row[key]) or (name == "grad_norm" and bool(row.get(f"{model}/scale_search_steps")))


def _count(row: Row, name: str) -> float:
    """Sum a count over models; actor and critic that share a loss scale count the same steps."""
    counts = [value for key, value in row.items() if key.endswith(f"/{name}") and is_number(value)]
    shared = {"actor/loss_scale", "critic/loss_scale"} <= row.keys()
    return max(counts, default=0.0) if shared else sum(counts)


def _of_reward_model(row: Row, key: str, *, seen: Seen) -> float | None:
    """A held-out result of the reward model: in the last row of its own stage, and repeated in the first of PPO."""
    is_its_end = row["step"] >= seen.total_steps and "eval/score_std" in row
    value = row.get(f"{'eval' if is_its_end else 'reward_model'}/{key}")
    return value if is_number(value) else None


def _ranking(accuracy: float, pairs: float, *, who: str, means: str) -> Finding:
    """Wrong where chance alone could give that accuracy on held-out pairs; `means` says what that is worth."""
    share = wilson(accuracy * pairs, int(pairs))
    text = (
        f"{who} ranks {share.mean:.0%} of {int(pairs):,} held-out pairs right (95% interval {share.low:.0%} to "
        f"{share.high:.0%}): as far as they tell it is no better than a coin, and {means}"
    )
    return Finding(not share.low > 0.5, text)


def _better_than_coin(row: Row, seen: Seen) -> Iterator[Finding]:
    accuracy, pairs = (_of_reward_model(row, key, seen=seen) for key in ("accuracy", "pairs"))
    if accuracy is not None and pairs is not None:
        means = (
            "PPO would learn noise. Train it on more or cleaner pairs, for longer, or from a larger model, before PPO."
        )
        yield _ranking(accuracy, pairs, who="The reward model", means=means)


def _pairs_ranked(row: Row, seen: Seen) -> Iterator[Finding]:
    accuracy, pairs = row.get("eval/accuracy"), row.get("eval/pairs")
    if row["step"] >= seen.total_steps and is_number(accuracy) and is_number(pairs):
        means = "has learnt nothing of new pairs. Train for longer, with a higher learning rate, or on cleaner pairs."
        yield _ranking(accuracy, pairs, who="The policy, by DPO's implicit reward,", means=means)


def _scores_differ(row: Row, seen: Seen) -> Iterator[Finding]:
    deviation = _of_reward_model(row, "score_std", seen=seen)
    if deviation is not None:
        text = (
            f"The reward model's scores of held-out responses deviate by {number(deviation)}, so it scores them "
            "nearly alike; ppo.score.normalize divides by that, and PPO would be paid for noise. Train it for "
            "longer, or with a higher learning rate, before PPO."
        )
        yield Finding(deviation < SMALL_DEVIATION, text)


def _within_clamp(row: Row, _: Seen) -> Iterator[Finding]:
    for key, what in (("eval/clamped", "held-out answers"), ("objective/clamped", "responses")):
        share = row.get(key)
        if is_number(share):
            text = (
                f"{share:.0%} of the {what} at step {row['step']} have a score at the limit, ppo.score.clamp: PPO "
                "cannot tell which of them is better. Raise ppo.score.clamp, or look at the deviation of its scores."
            )
            yield Finding(share > REPEATED, text)
            return


def _sources(row: Row, seen: Seen) -> Iterator[Finding]:
    """Wrong where a source has scored nothing so far, once there were a few rollouts to which it might apply."""
    shares = {key.split("/")[1]: row[key] for key in row if key.startswith("reward/") and key.endswith("/none")}
    seen.has_scored |= {name for name, share in shares.items() if share != 1}
    if shares and row["step"] >= min(_FEW_ROLLOUTS, seen.total_steps):
        silent = sorted(shares.keys() - seen.has_scored - {"log"})  # reward/log/none is a function's own metric
        text = (
            f"Up to step {row['step']} no response had a score of reward/{', reward/'.join(silent)}: what that is to "
            "reward counts for nothing. Look at which columns of the data it reads, or take it out of ppo.rewards."
        )
        yield Finding(bool(silent), text)


def _kl(row: Row, _: Seen) -> Iterator[Finding]:
    value = row.get("objective/kl_per_token")
    if is_number(value):
        text = (
            f"KL to the reference is {number(value)} nats per token at step {row['step']}: the policy has run away "
            "from the reference, to where its scores may mean nothing. Raise ppo.kl.coef, or lower ppo's "
            "learning rate."
        )
        yield Finding(value > KL_PER_TOKEN, text)


def _entropy(row: Row, seen: Seen) -> Iterator[Finding]:
    first, last = seen.first_entropy, row.get("objective/entropy")
    if is_number(last) and first is None:
        seen.first_entropy = last
    elif is_number(last) and first is not None:
        text = (
            f"Entropy fell from {number(first)} to {number(last)} nats per token by step {row['step']}: the policy "
            "says nearly the same thing every time and explores no more. Raise ppo.kl.coef, or lower ppo's learning "
            "rate."
        )
        yield Finding(last < ENTROPY_SHARE * first, text)


def _risen(row: Row, seen: Seen) -> Iterator[Finding]:
    if row["step"] < seen.total_steps:
        return
    found = change(seen.first_answers, seen.answers, key="score")
    if found is None:
        yield Finding(None, f"fewer than {SMALLEST_SAMPLE} answers have a score")
        return
    text = (
        f"The score of held-out answers has changed by {with_ends(found.mean, found.low, high=found.high)} over "
        f"{found.count} prompts from before training to its end at step {row['step']}: as far as they tell it has not "
        "risen. Look at the rewards, at ppo.kl.coef and at the learning rates."
    )
    yield Finding(found.low <= 0, text)


def _raw_score(row: Row, seen: Seen) -> Iterator[Finding]:
    sum_or_only = seen.raw_score
    raw, score = (change(seen.first_answers, seen.answers, key=key) for key in (sum_or_only, "score"))
    if raw is None or score is None:
        yield Finding(None, f"fewer than {SMALLEST_SAMPLE} answers have both scores")
        return
    text = (
        f"By step {row['step']} the score that PPO is paid for rose by {number(score.mean)} while that of its sources, "
        f"{sum_or_only}, fell by {with_ends(-raw.mean, -raw.high, high=-raw.low)} over {raw.count} held-out prompts: "
        "the rise comes from ppo.score (the penalty for answers that do not end, the clamp), not from better answers."
    )
    yield Finding(raw.high < 0 < score.mean, text)


def gold_metrics(row: Row) -> list[str]:
    """The gold metrics that an evaluation has."""
    return [key for key, value in row.items() if key.startswith("gold/") and is_number(value)]


def _gold(row: Row, seen: Seen) -> Iterator[Finding]:
    for key in gold_metrics(row):
        seen.evaluations[key] += 1
        best = seen.best.get(key)
        if best is None or row[key] > best[0][key]:
            seen.best[key] = (row, seen.answers)
            if best is not None:
                yield Finding(False, metric=key)
        else:
            yield _parted(row, key, answers=seen.answers, best=best, count=seen.evaluations[key])._replace(metric=key)


def _parted(row: Row, key: str, *, answers: Sequence[Row], best: tuple[Row, Sequence[Row]], count: int) -> Finding:
    """Wrong if the score rose and gold fell since the best of `count` evaluations (Gao et al. 2023, figure 1).

    The best of many evaluations is the luckiest one, so the 5% of false alarms are those of a whole stage: evaluation k
    has 1 / (k (k - 1)) of them, which sums to 1, shared between the k - 1 before it.
    """
    best_row, best_answers = best
    start, kl = best_row["step"], row.get("eval/kl")
    gold, score = (change(best_answers, answers, key=column) for column in (key, "score"))
    if gold is None or score is None:
        return Finding(None, f"fewer than {SMALLEST_SAMPLE} answers have a score and a {key}")
    # The interval widens by a ratio of normal quantiles, because the mean of many answers is nearly normal.
    wider = statistics.NormalDist().inv_cdf(1 - 0.025 / (count * (count - 1) ** 2)) / Z
    text = (
        f"From step {start} to step {row['step']} the score rose by {number(score.mean)} "
        f"while {key}, which no model was trained on, fell by {with_ends(-gold.mean, -gold.high, high=-gold.low)} over "
        f"{gold.count} prompts{f', at a KL of {number(kl)} nats' if is_number(kl) else ''}: the policy has learnt what "
        f"pleases its rewards, not what they stand for. By {key} the policy of step {start} is the best; "
        "raise ppo.kl.coef, or stop there."
    )
    return Finding(score.mean > 0 and gold.mean + wider * (gold.high - gold.mean) < 0, text)


def _length(_: Row, seen: Seen) -> Iterator[Finding]:
    found = length_correlation(seen.answers)
    # The score itself may have a third value: less a penalty for answers that do not end.
    scores = {score for row in seen.answers if is_number(score := row.get(seen.raw_score))}
    if found is None or len(scores) == 2:
        yield Finding(None, "all answers have one length or one score, or are just right or wrong")
        return
    text = (
        f"The longer a response, the higher its score (correlation {found:.2f} over {len(seen.answers)} held-out "
        "prompts): part of the reward may be for length alone. Compare answers of equal length, or balance preferences."
    )
    yield Finding(found > CORRELATED, text)


def _small_share(of: Callable[[Sequence[Row]], float], what: str, *, why: str) -> Look:
    """A check that is wrong where many answers have come to be so that were not at the first evaluation."""

    def look(row: Row, seen: Seen) -> Iterator[Finding]:
        before, after = of(seen.first_answers), of(seen.answers)
        found = f"{after:.0%} of the {len(seen.answers)} held-out responses {what} at step {row['step']} "
        yield Finding(after > before + REPEATED * (1 - before), f"{found}({before:.0%} at first): {why}.")

    return look


_repeats = _small_share(
    repeated_share,
    "are word for word that of another prompt",
    why="the policy has found an answer that pleases whatever the question is",
)
_degenerate = _small_share(degenerate_share, "are empty or repeat themselves", why="the text is falling apart")
_endless = _small_share(
    endless_share,
    "do not end by themselves",
    why="a longer response may be paid better than an end; see ppo.score.missing_eos_mode",
)

_TWICE = "it takes two evaluations of the same held-out prompts"
_UNKNOWN = "the held-out results of the reward model are not known"
_ENDS = "it takes held-out answers from before training and its end"
_ASKED = "no held-out prompts were answered"
_BOTH = (*REWARD, *PPO)
CHECKS = {
    "not_finite": Check(ALL, _finite, "all numbers are finite", "nothing was logged"),
    "coin": Check(_BOTH, _better_than_coin, "the reward model is better than a coin on held-out pairs", _UNKNOWN),
    "pairs": Check(DPO, _pairs_ranked, "held-out pairs are ranked better than by chance", "the stage has not ended"),
    "flat": Check(_BOTH, _scores_differ, "the reward model's scores differ", _UNKNOWN),
    "silent": Check(PPO, _sources, "every reward source gives scores", "too few rollouts were scored"),
    "clamp": Check(PPO, _within_clamp, "few scores are at the clamp", "no scores were logged"),
    "kl": Check(PPO, _kl, "KL has not run away", "no KL was logged"),
    "entropy": Check(PPO, _entropy, "entropy has not collapsed", "it takes two rows with an entropy"),
    "not_risen": Check(PPO, _risen, "the score has risen", _ENDS, evaluations=2),
    "raw_fell": Check(PPO, _raw_score, "the raw score has not fallen while the score rose", _TWICE, evaluations=2),
    "parted": Check(PPO, _gold, "score and gold metric have not parted", _TWICE, evaluations=1, needs_gold=True),
    "length": Check(PPO, _length, "longer answers are not scored higher", _ASKED, evaluations=1),
    "repeats": Check(PPO, _repeats, "answers have not become repetitive", _TWICE, evaluations=2),
    "degenerate": Check(PPO, _degenerate, "answers have not fallen apart", _TWICE, evaluations=2),
    "endless": Check(PPO, _endless, "answers have not become endless", _TWICE, evaluations=2),
}
"""The checks by name, with the stages that they concern."""
