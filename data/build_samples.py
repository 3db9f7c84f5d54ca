"""From the sources of a stage to its samples: choose rows, hold some out, weigh, tokenise, drop what is too long.

A row is tokenised once, however often its weight repeats it, and nothing is ever truncated.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.rows import (
    KNOWN_COLUMNS,
    SHOWN_PROBLEMS,
    BadRow,
    ColumnSelection,
    SkippedRow,
    SourceRows,
    bad_rows_report,
    check_row,
    further_columns,
    require_columns,
)
from data.sources import load_rows
from data.token_cache import RowTokens, cached, content_key
from rlhf.config.data_config import BadRows, DataConfig, SourceConfig, StageDataConfig
from rlhf.text.chat_template import Row
from rlhf.text.tokenize_rows import TokenSequence

logger = logging.getLogger(__name__)

SHARES = {"sft": 0, "reward": 1, "dpo": 1, "ppo": 2}
"""Position in `data.stage_split`; DPO takes the share of reward modelling, which it replaces. Others take all rows."""

RowNumbers = NDArray[np.int64]
Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Splits(Generic[Sample]):
    """The samples of a stage."""

    train: list[Sample]
    eval: list[Sample]
    dropped: dict[str, int]
    """Reason -> rows that were left out for it."""
    fingerprint: str
    """Hash of every token in `train` and `eval`, in order, and of their rows' further columns."""
    note: str = ""
    """A warning that the user should read once; empty if there is none."""

    @property
    def counts(self) -> dict[str, Any]:
        """Rows to train on, held out and dropped, and what identifies them, as JSON values for the stage's record."""
        found = {"train": len(self.train), "held_out": len(self.eval), "dropped": self.dropped}
        return found | {"fingerprint": self.fingerprint}


@dataclass(frozen=True)
class LengthLimits:
    """Longer rows are dropped; both in tokens."""

    stage: str
    max_prompt_tokens: int
    max_response_tokens: int
    response_setting: str = "max_response_tokens"
    max_tokens: int = 0
    """Of prompt and response together, in place of the limits of each; 0 is none."""

    def broken_by(self, sequences: Sequence[TokenSequence]) -> str:
        """Why a row is dropped; empty if it is short enough."""
        if self.max_tokens:
            too_long = any(len(tokens.input_ids) > self.max_tokens for tokens in sequences)
            return f"sequence longer than {self.stage}.max_tokens={self.max_tokens}" if too_long else ""
        if any(tokens.num_prompt > self.max_prompt_tokens for tokens in sequences):
            return f"prompt longer than {self.stage}.max_prompt_tokens={self.max_prompt_tokens}"
        if any(len(tokens.input_ids) - tokens.num_prompt > self.max_response_tokens for tokens in sequences):
            return f"response longer than {self.stage}.{self.response_setting}={self.max_response_tokens}"
        return ""


@dataclass(frozen=True)
class SampleKind(Generic[Sample]):
    """How a stage turns a row into samples."""

    stage: str
    """Its name under `data`."""
    alternatives: Sequence[Sequence[str]]
    """Sets of columns, one of which a row must fill."""
    limits: LengthLimits
    settings: Sequence[str]
    """Everything besides the row that decides how it is tokenised."""
    tokenize: Callable[[Row], list[TokenSequence]]
    build: Callable[[Row, list[TokenSequence]], list[Sample]]
    chat: bool = False
    """Whether there is a chat template, so that known dialogues become messages."""
    further_columns: Collection[str] | None = ()
    """Columns beside the known ones that `build` finds in a row if the source has them; None for all."""


def build_samples(kind: SampleKind[Sample], data: DataConfig, *, only_held_out: bool = False) -> Splits[Sample]:
    """Read, check and tokenise the data of a stage.

    Args:
        kind: How the stage turns a row into samples.
        data: The settings of all stages' data.
        only_held_out: Leave `train` empty; its files need not exist if `eval` has files of its own.

    Raises:
        ValueError: No data, rows that cannot be used, or all of them longer than the limits.
    """
    sources: StageDataConfig = getattr(data, kind.stage)
    name, seed = f"data.{kind.stage}", data.split_seed
    if not sources.train and not only_held_out:
        raise ValueError(f"{name}.train is empty; expected at least one file, folder or hub id.")
    train = _SplitBuilder(kind, sources.bad_rows, data.cache_dir)
    held_out = _SplitBuilder(kind, sources.bad_rows, data.cache_dir)
    needs_train = not only_held_out or (sources.eval_fraction and not sources.eval)
    for number, source in enumerate(sources.train if needs_train else []):
        part = _stage_rows(source, kind, data=data, where=f"{name}.train[{number}]")
        learnt, left_out = hold_out(part.numbers, 0.0 if sources.eval else sources.eval_fraction, seed=seed)
        if not only_held_out:
            train.add(part, weighted(learnt, max(source.weight, 1.0), seed=seed))
        held_out.add(part, left_out)
    for number, source in enumerate(sources.eval):
        part = _stage_rows(source, kind, data=data, where=f"{name}.eval[{number}]")
        held_out.add(part, weighted(part.numbers, max(source.weight, 1.0), seed=seed))
    for split, builder in (("train", train), ("eval", held_out)):
        if builder.dropped and not builder.samples:
            reasons = "; ".join(_listed(builder.dropped))
            raise ValueError(f"{name}.{split}: all rows were dropped: {reasons}. Raise the limit or use shorter rows.")
    digest = f"{train.digest.hexdigest()}|{held_out.digest.hexdigest()}"
    return Splits(
        train=train.samples,
        eval=held_out.samples,
        dropped=dict(train.dropped + held_out.dropped),
        fingerprint=hashlib.sha256(digest.encode()).hexdigest(),
        note=_note(train.rewritten + held_out.rewritten, name),
    )


def _note(rewritten: Counter[str], name: str) -> str:
    if not rewritten:
        return ""
    return (
        f"{name}: {rewritten['turns']} assistant turns in {rewritten['rows']} rows are not learnt: the chat template "
        "writes them differently once the conversation goes on (perhaps without their reasoning), so no model "
        f"generates them like that. {name}.rewritten_turns=as_generated learns each of them as it was when it was last."
    )


def _listed(dropped: Counter[str]) -> list[str]:
    """How many rows were dropped for each reason, the most frequent reasons first."""
    shown = dropped.most_common(SHOWN_PROBLEMS)
    rest = dropped.total() - sum(count for _, count in shown)
    more = [f"{rest} for {len(dropped) - SHOWN_PROBLEMS} more reasons"] * (rest > 0)
    return [f"{count} for a {reason}" for reason, count in shown] + more


# ---- which rows of a source a stage uses, and how often: numbers alone


@dataclass(frozen=True)
class _StageRows:
    """The rows of one source that belong to a stage."""

    rows: SourceRows
    numbers: RowNumbers
    where: str
    """The source, for messages."""


def _stage_rows(source: SourceConfig, kind: SampleKind[Sample], *, data: DataConfig, where: str) -> _StageRows:
    wanted = None if kind.further_columns is None else {*KNOWN_COLUMNS, *kind.further_columns}
    rows = load_rows(source, wanted, stage=kind.stage, chat=kind.chat)
    if rows.found:  # if there are no columns, no row could be read, and the error about the rows says more
        found = ColumnSelection(source.columns).our_names(rows.found).values()
        require_columns([*found], kind.alternatives, where=where)
    shares = data.stage_split if kind.stage in SHARES else []
    numbers = rows_of_stage(len(rows), shares, position=SHARES.get(kind.stage, 0), seed=data.split_seed)
    if len(numbers) == 0:
        raise ValueError(f"data.stage_split={data.stage_split} leaves {kind.stage} none of {len(rows)} rows.")
    try:
        numbers = weighted(numbers, min(source.weight, 1.0), seed=data.split_seed)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error
    return _StageRows(rows, numbers, f"{where} ({source.path})")


def rows_of_stage(num_rows: int, shares: Sequence[float], *, position: int, seed: int) -> RowNumbers:
    """The rows of the stage at `position`, in the order of DeepSpeed-Chat's `--data_split`.

    The same numbers as its `get_raw_dataset_split_index`: boundaries are running sums of rounded shares, moved together
    until the last one fits, over a permutation by `numpy.random.RandomState(seed)`. One difference: with a handful of
    rows a boundary can become negative there, which gives rows to two stages; here it is 0.

    Args:
        num_rows: Rows of the data set.
        shares: `data.stage_split`, of any sum; empty gives every stage all rows in their own order.
        position: 0, 1 or 2 for sft, reward and ppo.
        seed: `data.split_seed`.
    """
    if not shares:
        return np.arange(num_rows)
    counts = [round(share / sum(shares) * float(num_rows)) for share in shares]
    bounds = np.concatenate([[0], np.cumsum(counts)])
    bounds[1:] -= bounds[-1] - num_rows
    start, end = bounds.clip(min=0)[position : position + 2]
    order = np.arange(num_rows)
    np.random.RandomState(seed).shuffle(order)
    return order[start:end]


def hold_out(rows: RowNumbers, fraction: float, *, seed: int) -> tuple[RowNumbers, RowNumbers]:
    """Split `rows` into those to train on and `fraction` of them to evaluate on: at least one, never all.

    Each part keeps its order. The choice depends on the number of rows and `seed` alone, so stages that read the same
    file with the same fraction hold out the same rows.
    """
    count = min(max(round(fraction * len(rows)), fraction > 0), max(len(rows) - 1, 0))
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[np.random.default_rng(seed).permutation(len(rows))[:count]] = True
    return rows[~held_out], rows[held_out]


def weighted(rows: RowNumbers, weight: float, *, seed: int) -> RowNumbers:
    """`rows` as often as `weight` says: 0.5 takes half of them, 2 takes each twice, 1.5 all and half of them again.

    `seed` decides which half, and a larger fraction contains a smaller one. The order of `rows` is kept.

    Raises:
        ValueError: `weight` is not positive, or so small that no row is left.
    """
    if not weight > 0:
        raise ValueError(f"weight={weight}: expected a positive number; leave the data set out to use none of it.")
    whole = int(weight)
    extra = round((weight - whole) * len(rows))
    if len(rows) > 0 and whole == 0 and extra == 0:
        raise ValueError(f"weight={weight}: less than one of {len(rows)} rows; expected at least {1 / len(rows):.2g}.")
    drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:extra])
    return np.concatenate([rows] * whole + [rows[drawn]])


# ---- from rows to samples


@dataclass
class _SplitBuilder(Generic[Sample]):
    """Collects the samples of `train` or `eval` from all sources."""

    kind: SampleKind[Sample]
    bad_rows: BadRows
    cache_dir: str | None
    samples: list[Sample] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    rewritten: Counter[str] = field(default_factory=Counter)
    """Answers that the template rewrites, see `AssistantTurns`: number of `turns`, and of the `rows` they are in."""
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, source: _StageRows, numbers: RowNumbers) -> None:
        """Add the samples of the rows `numbers`, in that order; a number may come twice."""
        if len(numbers) == 0:
            return
        distinct, order = np.unique(numbers, return_inverse=True)
        rows = [source.rows[number] for number in distinct.tolist()]
        used: dict[int, tuple[Row, RowTokens]] = {}
        dropped: Counter[str] = Counter()
        for index, (row, tokens) in enumerate(zip(rows, self._tokens(rows, source, numbers=distinct), strict=True)):
            if isinstance(tokens, BadRow):
                is_left_out = isinstance(tokens, SkippedRow)
                dropped[tokens.reason if is_left_out else f"row that cannot be used: {tokens.reason}"] += 1
            elif reason := self.kind.limits.broken_by(tokens):
                dropped[reason] += 1
            else:
                assert not isinstance(row, BadRow), "a bad row has no tokens"
                used[index] = row, tokens
        samples = {index: self.kind.build(row, tokens) for index, (row, tokens) in used.items()}
        for index in order.tolist():
            if index in used:
                self.samples += samples[index]
                self._update_digest(*used[index])
        turns = [sum(len(sequence.rewritten) for sequence in tokens) for _, tokens in used.values()]
        self.rewritten += Counter(turns=sum(turns), rows=sum(count > 0 for count in turns))
        self.dropped += dropped
        if dropped:
            head = f"{source.where}: dropped {dropped.total()} of {len(rows)} rows"
            logger.warning("%s", "\n  ".join([head, *_listed(dropped)]))

    def _tokens(
        self, rows: list[Row | BadRow], source: _StageRows, *, numbers: RowNumbers
    ) -> Sequence[RowTokens | BadRow]:
        """The tokens of each row; raises ValueError for bad rows unless they are to be dropped."""
        key = content_key(rows, self.kind.settings) if self.cache_dir else ""
        results = cached(self.cache_dir, key, make=lambda: [self._tokenize(row) for row in rows])
        pairs = zip(numbers.tolist(), results, strict=True)
        bad = [
            (source.rows.place(number), result)
            for number, result in pairs
            if isinstance(result, BadRow) and not isinstance(result, SkippedRow)
        ]
        if bad and self.bad_rows is BadRows.stop:
            raise ValueError(bad_rows_report(bad, where=source.where, num_rows=len(rows)))
        return results

    def _tokenize(self, row: Row | BadRow) -> RowTokens | BadRow:
        if isinstance(row, BadRow):
            return row
        try:
            check_row(row, self.kind.alternatives)
            return self.kind.tokenize(row)
        except ValueError as error:
            return BadRow(str(error))
        except RecursionError:
            return BadRow("a value is nested too deeply to be written out.")

    def _update_digest(self, row: Row, sequences: RowTokens) -> None:
        for tokens in sequences:
            self.digest.update(np.int64(len(tokens.input_ids)).tobytes())
            self.digest.update(tokens.input_ids.tobytes() + tokens.target_mask.tobytes())
        if columns := further_columns(row):
            self.digest.update(json.dumps(columns, sort_keys=True, default=str).encode())
