"""From the sources of a stage to its samples: share, hold out, weigh, tokenise, drop what is too long.

A row is tokenised once, however often its weight repeats it, and nothing is ever truncated.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from data.blend import weighted
from data.cache import cached, content_key
from data.rows import COLUMNS, SHOWN_PROBLEMS, BrokenRow, each_row, require_columns
from data.sources import load_rows
from data.split import Indices, hold_out, stage_rows
from data.table import Rows
from rlhf.config.data_config import BadRows, DataConfig, SourceConfig, StageDataConfig
from rlhf.text.tokenizer import Row, Tokens

logger = logging.getLogger(__name__)

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
    """What should be said of them once; empty where that is nothing."""


@dataclass(frozen=True)
class Limits:
    """Longer rows are dropped; both in tokens."""

    stage: str
    max_prompt_tokens: int
    max_response_tokens: int
    response_setting: str = "max_response_tokens"

    def broken_by(self, sequences: Sequence[Tokens]) -> str:
        """Why a row is dropped; empty where it is not."""
        if any(tokens.num_prompt > self.max_prompt_tokens for tokens in sequences):
            return f"prompt longer than {self.stage}.max_prompt_tokens={self.max_prompt_tokens}"
        if any(len(tokens.input_ids) - tokens.num_prompt > self.max_response_tokens for tokens in sequences):
            return f"response longer than {self.stage}.{self.response_setting}={self.max_response_tokens}"
        return ""


@dataclass(frozen=True)
class Recipe(Generic[Sample]):
    """What a stage makes of a row."""

    stage: str
    """Its name under `data` and in the configuration."""
    position: int
    """Its place in `data.stage_split`."""
    sources: StageDataConfig
    limits: Limits
    columns: Sequence[Sequence[str]]
    """Sets of columns, one of which is needed."""
    settings: Sequence[str]
    """What decides, besides the row, how it is tokenised."""
    tokenize: Callable[[Row], list[Tokens]]
    """Checks a row and tokenises it."""
    build: Callable[[Row, list[Tokens]], list[Sample]]
    """The samples of a row, from its sequences."""
    extra_columns: Sequence[str] = ()
    """Columns beside the known ones that `build` reads, where a source has them."""
    only_held_out: bool = False
    """Leave `train` empty: nobody wants it, and it need not be there."""


@dataclass
class _Pile(Generic[Sample]):
    """Samples of all sources of one split."""

    name: str
    samples: list[Sample] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    rewritten: Counter[str] = field(default_factory=Counter)
    """Answers that are not learnt, see `rlhf.text.chat_template.Turns`: `turns`, and the `rows` that have some."""
    digest: str = ""

    def require_some(self) -> None:
        if self.dropped and not self.samples:
            reasons = "; ".join(f"{count} for a {reason}" for reason, count in self.dropped.items())
            raise ValueError(f"{self.name}: all rows were dropped: {reasons}. Raise the limit or use shorter rows.")


def assemble(recipe: Recipe[Sample], *, data: DataConfig) -> Splits[Sample]:
    """Read, check and tokenise the data of a stage.

    Raises:
        ValueError: No data, rows that cannot be used, or all of them longer than the limits.
    """
    name, sources = f"data.{recipe.stage}", recipe.sources
    if not sources.train and not recipe.only_held_out:
        raise ValueError(f"{name}.train is empty; expected at least one file, folder or hub id.")
    train, held_out = _Pile[Sample](f"{name}.train"), _Pile[Sample](f"{name}.eval")
    skipped = recipe.only_held_out and (sources.eval or not sources.eval_fraction)
    for number, source in enumerate([] if skipped else sources.train):
        part = _Part.open(source, recipe, data=data, where=f"{name}.train[{number}]")
        halves = hold_out(part.rows, 0.0 if sources.eval else sources.eval_fraction, seed=data.split_seed)
        if not recipe.only_held_out:
            part.add(weighted(halves.train, max(source.weight, 1.0), seed=data.split_seed), train)
        part.add(halves.eval, held_out)
    for number, source in enumerate(sources.eval):
        part = _Part.open(source, recipe, data=data, where=f"{name}.eval[{number}]")
        part.add(weighted(part.rows, max(source.weight, 1.0), seed=data.split_seed), held_out)
    for pile in (train, held_out):
        pile.require_some()
    fingerprint = hashlib.sha256((train.digest + "|" + held_out.digest).encode()).hexdigest()
    dropped, note = train.dropped + held_out.dropped, _note(train.rewritten + held_out.rewritten, name)
    return Splits(train.samples, held_out.samples, dict(dropped), fingerprint, note)


def _note(rewritten: Counter[str], name: str) -> str:
    if not rewritten:
        return ""
    return (
        f"{name}: {rewritten['turns']} assistant turns in {rewritten['rows']} rows are not learnt: the chat template "
        "writes them differently once the conversation goes on (without their reasoning, perhaps), so nobody "
        f"generates them so. {name}.rewritten_turns=as_generated learns each of them as it was when it was last."
    )


@dataclass(frozen=True)
class _Part(Generic[Sample]):
    """The rows of one source that belong to a stage."""

    recipe: Recipe[Sample]
    table: Rows
    rows: Indices
    where: str
    cache_dir: str | None

    @classmethod
    def open(cls, source: SourceConfig, recipe: Recipe[Sample], *, data: DataConfig, where: str) -> _Part[Sample]:
        table = load_rows(source, {*COLUMNS, *recipe.extra_columns})
        if table.columns:  # else no row could be read, which the rows say
            require_columns(table.columns, recipe.columns, where=where)
        rows = stage_rows(len(table), data.stage_split, position=recipe.position, seed=data.split_seed)
        if len(rows) == 0:
            raise ValueError(f"data.stage_split={data.stage_split} leaves {recipe.stage} none of {len(table)} rows.")
        try:
            rows = weighted(rows, min(source.weight, 1.0), seed=data.split_seed)
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from error
        return cls(recipe, table, rows, f"{where} ({source.path})", data.cache_dir)

    def add(self, numbers: Indices, pile: _Pile[Sample]) -> None:
        """Put the samples of the rows `numbers` on a pile, in that order; a number may come twice."""
        if len(numbers) == 0:
            return
        distinct, place = np.unique(numbers, return_inverse=True)
        rows = self.table.take(distinct)
        tokens, reasons = self._usable(rows) if self.drops_bad_rows else (self._tokens(rows, distinct), {})
        reasons |= {index: reason for index in tokens if (reason := self.recipe.limits.broken_by(tokens[index]))}
        kept = [index for index in place.tolist() if index not in reasons]
        samples = {index: self.recipe.build(rows[index], tokens[index]) for index in dict.fromkeys(kept)}
        pile.samples += [sample for index in kept for sample in samples[index]]
        pile.digest += _digest([sequence for index in kept for sequence in tokens[index]])
        turns = [len(sequence.rewritten) for index in samples for sequence in tokens[index]]
        pile.rewritten += Counter(turns=sum(turns), rows=sum(count > 0 for count in turns))
        self._count(Counter(reasons.values()), pile, num_rows=len(rows))

    @property
    def drops_bad_rows(self) -> bool:
        """Whether a row that cannot be used is dropped, rather than stopping the run."""
        return self.recipe.sources.bad_rows is BadRows.drop

    def _usable(self, rows: list[Row]) -> tuple[dict[int, list[Tokens]], dict[int, str]]:
        """The tokens of each row that can be used, and why each other one cannot; not cached."""
        tokens: dict[int, list[Tokens]] = {}
        reasons: dict[int, str] = {}
        for index, row in enumerate(rows):
            try:
                tokens[index] = self._tokenize(row)
            except ValueError as error:
                reasons[index] = f"row that cannot be used: {error}"
        return tokens, reasons

    def _tokens(self, rows: list[Row], numbers: Indices) -> dict[int, list[Tokens]]:
        """The tokens of every row; raises ValueError unless all can be used."""

        def make() -> list[list[Tokens]]:
            return each_row(rows, self._tokenize, places=self.table.places(numbers), where=self.where)

        return dict(enumerate(cached(self.cache_dir, content_key(rows, self.recipe.settings), make=make)))

    def _tokenize(self, row: Row) -> list[Tokens]:
        if isinstance(row, BrokenRow):
            raise ValueError(row["problem"])
        try:
            return self.recipe.tokenize(row)
        except RecursionError as error:
            raise ValueError("a value is nested too deeply to be written out.") from error

    def _count(self, dropped: Counter[str], pile: _Pile[Sample], *, num_rows: int) -> None:
        pile.dropped += dropped
        for reason, count in dropped.most_common(SHOWN_PROBLEMS):
            logger.warning("%s: dropped %d of %d rows: %s", self.where, count, num_rows, reason)
        rest = [count for _, count in dropped.most_common()[SHOWN_PROBLEMS:]]
        if rest:
            logger.warning("%s: dropped %d more rows for %d more reasons", self.where, sum(rest), len(rest))


def _digest(sequences: Sequence[Tokens]) -> str:
    digest = hashlib.sha256()
    for tokens in sequences:
        digest.update(np.int64(len(tokens.input_ids)).tobytes())
        digest.update(tokens.input_ids.tobytes() + tokens.target_mask.tobytes())
    return digest.hexdigest()
