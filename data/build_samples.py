"""From the sources of a stage to its samples: split, hold out, weigh, tokenise, drop what is too long.

A row is tokenised once, however often its weight repeats it, and nothing is ever truncated.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from data.row_selection import RowNumbers, hold_out, rows_of_stage, weighted
from data.rows import (
    KNOWN_COLUMNS,
    SHOWN_PROBLEMS,
    BadRow,
    ColumnSelection,
    SourceRows,
    bad_rows_report,
    check_row,
    require_columns,
)
from data.sources import load_rows
from data.token_cache import RowTokens, cached, content_key
from rlhf.config.data_config import BadRows, DataConfig, SourceConfig, StageDataConfig
from rlhf.text.chat_template import Row
from rlhf.text.tokenize_rows import TokenSequence

logger = logging.getLogger(__name__)

STAGES = ("sft", "reward", "ppo")
"""In the order of `data.stage_split`."""

Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Splits(Generic[Sample]):
    """The samples of a stage."""

    train: list[Sample]
    eval: list[Sample]
    dropped: dict[str, int]
    """Reason -> rows that were left out for it."""
    fingerprint: str
    """Hash of every token in `train` and `eval`, in order."""
    note: str = ""
    """A warning that the user should read once; empty if there is none."""


@dataclass(frozen=True)
class LengthLimits:
    """Longer rows are dropped; both in tokens."""

    stage: str
    max_prompt_tokens: int
    max_response_tokens: int
    response_setting: str = "max_response_tokens"

    def broken_by(self, sequences: Sequence[TokenSequence]) -> str:
        """Why a row is dropped; empty if it is short enough."""
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
    columns: Sequence[Sequence[str]]
    """Sets of columns, one of which a row must fill."""
    limits: LengthLimits
    settings: Sequence[str]
    """Everything besides the row that decides how it is tokenised."""
    tokenize: Callable[[Row], list[TokenSequence]]
    build: Callable[[Row, list[TokenSequence]], list[Sample]]
    extra_columns: Sequence[str] = ()
    """Columns beside the known ones that `build` reads if a source has them."""


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
    train = _SplitBuilder(kind, sources.bad_rows, data.cache_dir, name=f"{name}.train")
    held_out = _SplitBuilder(kind, sources.bad_rows, data.cache_dir, name=f"{name}.eval")
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
    for split in (train, held_out):
        split.require_some()
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


@dataclass(frozen=True)
class _StageRows:
    """The rows of one source that belong to a stage."""

    rows: SourceRows
    numbers: RowNumbers
    where: str
    """The source, for messages."""


def _stage_rows(source: SourceConfig, kind: SampleKind[Sample], *, data: DataConfig, where: str) -> _StageRows:
    rows = load_rows(source, {*KNOWN_COLUMNS, *kind.extra_columns})
    if rows.found:  # if there are no columns, no row could be read, and the error about the rows says more
        found = ColumnSelection(source.columns).our_names(rows.found).values()
        require_columns([*found], kind.columns, where=where)
    numbers = rows_of_stage(len(rows), data.stage_split, position=STAGES.index(kind.stage), seed=data.split_seed)
    if len(numbers) == 0:
        raise ValueError(f"data.stage_split={data.stage_split} leaves {kind.stage} none of {len(rows)} rows.")
    try:
        numbers = weighted(numbers, min(source.weight, 1.0), seed=data.split_seed)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error
    return _StageRows(rows, numbers, f"{where} ({source.path})")


@dataclass
class _SplitBuilder(Generic[Sample]):
    """Collects the samples of `train` or `eval` from all sources."""

    kind: SampleKind[Sample]
    bad_rows: BadRows
    cache_dir: str | None
    name: str
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
        samples: dict[int, list[Sample]] = {}
        tokens: dict[int, RowTokens] = {}
        reasons: dict[int, str] = {}
        for index, (row, result) in enumerate(zip(rows, self._tokens(rows, source, numbers=distinct), strict=True)):
            if isinstance(result, BadRow):
                reasons[index] = f"row that cannot be used: {result.reason}"
            elif reason := self.kind.limits.broken_by(result):
                reasons[index] = reason
            else:
                assert not isinstance(row, BadRow), "a bad row has no tokens"
                samples[index], tokens[index] = self.kind.build(row, result), result
        for index in order.tolist():
            self.samples += samples.get(index, [])
            self._update_digest(tokens.get(index, []))
        turns = [sum(len(sequence.rewritten) for sequence in sequences) for sequences in tokens.values()]
        self.rewritten += Counter(turns=sum(turns), rows=sum(count > 0 for count in turns))
        if reasons:
            dropped = Counter(reasons.values())
            self.dropped += dropped
            head = f"{source.where}: dropped {len(reasons)} of {len(rows)} rows"
            logger.warning("%s", "\n  ".join([head, *_listed(dropped)]))

    def _tokens(
        self, rows: list[Row | BadRow], source: _StageRows, *, numbers: RowNumbers
    ) -> Sequence[RowTokens | BadRow]:
        """The tokens of each row; raises ValueError for bad rows unless they are to be dropped."""
        key = content_key(rows, self.kind.settings) if self.cache_dir else ""
        results = cached(self.cache_dir, key, make=lambda: [self._tokenize(row) for row in rows])
        bad = [
            (source.rows.place(number), result)
            for number, result in zip(numbers.tolist(), results, strict=True)
            if isinstance(result, BadRow)
        ]
        if bad and self.bad_rows is BadRows.stop:
            raise ValueError(bad_rows_report(bad, where=source.where, num_rows=len(rows)))
        return results

    def _tokenize(self, row: Row | BadRow) -> RowTokens | BadRow:
        if isinstance(row, BadRow):
            return row
        try:
            check_row(row, self.kind.columns)
            return self.kind.tokenize(row)
        except ValueError as error:
            return BadRow(str(error))
        except RecursionError:
            return BadRow("a value is nested too deeply to be written out.")

    def _update_digest(self, sequences: Sequence[TokenSequence]) -> None:
        for tokens in sequences:
            self.digest.update(np.int64(len(tokens.input_ids)).tobytes())
            self.digest.update(tokens.input_ids.tobytes() + tokens.target_mask.tobytes())

    def require_some(self) -> None:
        """Raise ValueError if there were rows, and all of them were dropped."""
        if self.dropped and not self.samples:
            reasons = "; ".join(_listed(self.dropped))
            raise ValueError(f"{self.name}: all rows were dropped: {reasons}. Raise the limit or use shorter rows.")


def _listed(dropped: Counter[str]) -> list[str]:
    """How many rows were dropped for each reason, the most frequent reasons first."""
    shown = dropped.most_common(SHOWN_PROBLEMS)
    rest = dropped.total() - sum(count for _, count in shown)
    more = [f"{rest} for {len(dropped) - SHOWN_PROBLEMS} more reasons"] * (rest > 0)
    return [f"{count} for a {reason}" for reason, count in shown] + more
