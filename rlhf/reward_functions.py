"""Functions of the user's as reward sources, called as TRL's GRPOTrainer calls them.

A function is called with keyword arguments, each a list with one item per response: `prompts`, `completions`,
`completion_ids`, and further columns of the data by their names; it gets those that its signature names, and all of
them with `**kwargs`. Where a prompt is a list of messages, the prompt and the completion are such lists, else text. It
returns a list of numbers; None says that it does not apply to a response. `trainer_state` has `global_step` and
`max_steps`, counted in iterations. Functions may be async, and then wait at the same time. Left out: TRL's `log_extra`,
`log_metric` and `environments`.

    def correct(completions, answer, **kwargs):
        return [1.0 if reply.strip() == right else 0.0 for reply, right in zip(completions, answer)]

Every rank calls the functions with its own responses. See also: `rewards.py`, where scores of all sources become one.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf.config.reward_config import RewardErrors, RewardSettings
from rlhf.runtime.dist import agreed
from rlhf.runtime.errors import RunError
from rlhf.runtime.user_functions import TimeLimitError, described, load_function, time_limit

log = logging.getLogger(__name__)

_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state")
_LACKING = ("log_extra", "log_metric", "environments")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_LARGEST = float(torch.finfo(torch.float32).max)
_GRACE_S = 1.0
"""Seconds after which a signal interrupts an async function that does not let go of the event loop."""
_SIGNATURE = "called with prompts, completions and columns of the data by name, and returning one number for each"


@dataclass(frozen=True)
class RewardRows:
    """Responses as functions see them, B of each."""

    prompts: Sequence[Any]
    """Text or messages."""
    completions: Sequence[str]
    completion_ids: Sequence[list[int]]
    columns: Sequence[Mapping[str, Any]]
    """Further columns of the data."""
    state: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(global_step=0, max_steps=0))

    @classmethod
    def of(
        cls,
        columns: Sequence[Mapping[str, Any]],
        *,
        texts: Sequence[str],
        token_ids: Sequence[list[int]],
        step: int = 0,
        total_steps: int = 0,
    ) -> RewardRows:
        """Responses to prompts whose `columns` also hold the prompt as it was given."""
        prompts = [row.get("prompt", "") for row in columns]
        further = [{name: value for name, value in row.items() if name != "prompt"} for row in columns]
        state = SimpleNamespace(global_step=step, max_steps=total_steps)
        return cls(prompts, list(texts), token_ids, further, state)

    def __len__(self) -> int:
        return len(self.completions)

    def row(self, number: int) -> RewardRows:
        """One of them."""
        one = slice(number, number + 1)
        return RewardRows(
            self.prompts[one], self.completions[one], self.completion_ids[one], self.columns[one], self.state
        )

    def arguments(self) -> dict[str, Any]:
        """Everything that a function may be given, in lists of its own."""
        names = dict.fromkeys(name for row in self.columns for name in row)
        replies = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.prompts, self.completions, strict=True)
        ]
        return {
            **{name: [row.get(name) for row in self.columns] for name in names},
            "prompts": list(self.prompts),
            "completions": replies,
            "completion_ids": [list(ids) for ids in self.completion_ids],
            "trainer_state": self.state,
        }

    def shown(self, number: int) -> str:
        """One of them for messages, from the beginning."""
        return f"the response {_shortened(self.completions[number])} to the prompt {_shortened(self.prompts[number])}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


@dataclass(frozen=True)
class RewardFunction:
    """A function of the user's."""

    name: str
    setting: str
    """The setting that names it, with its value, for messages."""
    call: Callable[..., Any]
    parameters: Mapping[str, bool]
    """Columns that its signature names, and whether it needs them."""
    takes_all: bool
    """Whether it has `**kwargs`."""

    @classmethod
    def load(cls, source: str, *, name: str, setting: str) -> RewardFunction:
        """Import it and read its signature.

        Raises:
            ValueError: there is no such function, or it cannot be called as functions are.
        """
        setting = f"{setting}={source}"
        function = load_function(source, setting, signature=_SIGNATURE)
        try:
            found = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{setting}: its parameters cannot be read ({error}); expected a plain function."
            ) from error
        needed = {item.name for item in found if item.default is item.empty}
        places = [item.name for item in found if item.kind is item.POSITIONAL_ONLY and item.name in needed]
        if places:
            raise ValueError(
                f"{setting}: {', '.join(places)} cannot be given by name; expected a function, {_SIGNATURE}."
            )
        named = {item.name: item.name in needed for item in found if item.kind in _NAMED}
        if lacking := [name for name in _LACKING if named.get(name)]:
            raise ValueError(f"{setting}: needs {', '.join(lacking)}, which is not given here; make it optional.")
        is_open = any(item.kind is item.VAR_KEYWORD for item in found)
        if not is_open and not {"completions", "completion_ids"} & named.keys():
            raise ValueError(
                f"{setting}: takes neither completions nor completion_ids; expected a function, {_SIGNATURE}."
            )
        columns = {name: needs for name, needs in named.items() if name not in (*_GIVEN, *_LACKING)}
        given = {name: False for name in _GIVEN if name in named}
        return cls(name, setting, function, columns | given, is_open)

    @property
    def columns(self) -> dict[str, bool]:
        """Columns of the data that its signature names, and whether it needs them."""
        return {name: needs for name, needs in self.parameters.items() if name not in _GIVEN}

    @property
    def is_async(self) -> bool:
        """Whether a call returns an awaitable."""
        return inspect.iscoroutinefunction(self.call) or inspect.iscoroutinefunction(type(self.call).__call__)

    def arguments(self, rows: RewardRows) -> dict[str, Any]:
        """What it is called with: a column that only some rows have is None in the others."""
        given = rows.arguments()
        missing = {name: [None] * len(rows) for name, needs in self.columns.items() if needs and name not in given}
        return {name: value for name, value in given.items() if self.takes_all or name in self.parameters} | missing


class _CallError(Exception):
    """A call that failed, or returned something other than one score for each response."""


@dataclass
class RewardFunctions:
    """All functions of a stage."""

    functions: Sequence[RewardFunction]
    stage: str
    timeout_s: float
    on_error: RewardErrors
    _loop: asyncio.AbstractEventLoop | None = None
    """Runs async functions; the same one every time, as clients that they keep belong to it."""

    @classmethod
    def load(cls, config: RewardSettings, *, stage: str) -> RewardFunctions:
        """Import the functions among `config.rewards`.

        Raises:
            ValueError: which of them cannot be used, and why.
        """
        functions = [
            RewardFunction.load(source.source, name=source.name, setting=f"{stage}.{setting}")
            for setting, source in config.function_sources.items()
        ]
        return cls(functions, stage, config.reward_timeout_s, config.reward_on_error)

    @property
    def columns(self) -> set[str] | None:
        """Columns of the data that they read, the prompt included; None for all."""
        if any(function.takes_all for function in self.functions):
            return None
        return {name for function in self.functions for name in ("prompt", *function.columns)}

    def score(self, rows: RewardRows) -> Tensor:
        """Scores `[B, functions]` fp32 of this rank's responses: NaN does not apply, infinity is a failure.

        Every rank must call it equally often.

        Raises:
            RunError: a function failed on some rank, or took too long.
        """
        if not self.functions:
            return torch.zeros(len(rows), 0)
        with agreed() as outcome:
            outputs = self._outputs(self.functions, rows)
            columns = [self._scores(f, output, rows=rows) for f, output in zip(self.functions, outputs, strict=True)]
        if outcome.error:
            raise RunError(outcome.error) from outcome.cause
        return torch.tensor(columns, dtype=torch.float32).T.contiguous()  # [functions, B] -> [B, functions]

    def _scores(self, function: RewardFunction, output: list[float] | _CallError, *, rows: RewardRows) -> list[float]:
        """The scores of a call; if it failed and failures are dropped, those of calls with one response each."""
        if not isinstance(output, _CallError):
            return output
        if self.on_error is RewardErrors.stop:
            raise RunError(f"{output} {self._advice}") from output.__cause__
        alone: list[list[float] | _CallError] = [output]
        if len(rows) > 1:
            alone = [self._outputs([function], rows.row(number))[0] for number in range(len(rows))]
        failed = [error for error in alone if isinstance(error, _CallError)]
        if failed:
            log.warning("left out %d of %d responses: %s", len(failed), len(rows), failed[0])
        return [math.inf if isinstance(found, _CallError) else found[0] for found in alone]

    @property
    def _advice(self) -> str:
        return (
            f"Mend the function, let it return None for a response that it cannot score, or leave such responses out "
            f"with {self.stage}.reward_on_error=drop."
        )

    def _outputs(self, functions: Sequence[RewardFunction], rows: RewardRows) -> list[list[float] | _CallError]:
        """What each function says of the rows, or why it failed; the async ones wait at the same time."""
        later = [function for function in functions if function.is_async]
        found = {f.setting: self._called(f, rows) for f in functions if not f.is_async}
        if later:
            self._loop = self._loop or asyncio.new_event_loop()
            try:
                with time_limit(self.timeout_s + _GRACE_S):
                    found |= self._loop.run_until_complete(self._gathered(later, rows))
            except TimeLimitError as error:
                raise self._too_long(*later) from error
        return [found[function.setting] for function in functions]

    def _called(self, function: RewardFunction, rows: RewardRows) -> list[float] | _CallError:
        try:
            with time_limit(self.timeout_s):
                output = function.call(**function.arguments(rows))
            return parsed_scores(output, function, rows=rows)
        except TimeLimitError as error:
            raise self._too_long(function) from error
        except Exception as error:  # noqa: BLE001 - whatever the user's code raises
            return _failure(error, function, rows=rows)

    async def _gathered(
        self, functions: Sequence[RewardFunction], rows: RewardRows
    ) -> dict[str, list[float] | _CallError]:
        found = await asyncio.gather(*(self._awaited(function, rows) for function in functions))
        return dict(zip((function.setting for function in functions), found, strict=True))

    async def _awaited(self, function: RewardFunction, rows: RewardRows) -> list[float] | _CallError:
        call = asyncio.ensure_future(function.call(**function.arguments(rows)))
        done, _ = await asyncio.wait([call], timeout=self.timeout_s)
        if not done:
            call.cancel()
            raise self._too_long(function)
        try:
            return parsed_scores(call.result(), function, rows=rows)
        except Exception as error:  # noqa: BLE001 - whatever the user's code raises
            return _failure(error, function, rows=rows)

    def _too_long(self, *functions: RewardFunction) -> RunError:
        names = " and ".join(function.setting for function in functions)
        return RunError(
            f"{names} took longer than {self.stage}.reward_timeout_s={self.timeout_s:g} seconds. See what it waits "
            "for, give its own requests a shorter time limit, or raise that setting."
        )


def _failure(error: Exception, function: RewardFunction, *, rows: RewardRows) -> _CallError:
    if isinstance(error, _CallError):
        return error
    more = f"one of {len(rows)} responses, such as " if len(rows) > 1 else ""
    failed = _CallError(f"{function.setting} raised {described(error)} on {more}{rows.shown(0)}.")
    failed.__cause__ = error
    return failed


def parsed_scores(output: Any, function: RewardFunction, *, rows: RewardRows) -> list[float]:
    """What a function returned, as finite numbers; NaN where it was None.

    Raises:
        _CallError: it is no list of one score for each response.
    """
    expected = f"expected a list of {len(rows)} scores, each a finite number, or None where it does not apply"
    if not isinstance(output, Iterable) or isinstance(output, str | bytes | Mapping):
        raise _CallError(f"{function.setting} returned {_shortened(output)}; {expected}.")
    scores = list(output)
    if len(scores) != len(rows):
        raise _CallError(f"{function.setting} returned {len(scores)} scores for {len(rows)} responses; {expected}.")
    for number, score in enumerate(scores):
        scores[number] = math.nan if score is None else _number(score)
        if scores[number] is None:
            raise _CallError(f"{function.setting} returned {_shortened(score)} for {rows.shown(number)}; {expected}.")
    return scores


def _number(score: Any) -> float | None:
    """A score as a number that fp32 can hold; None if it is none."""
    if isinstance(score, str | bytes):
        return None
    try:
        value = float(score)  # numbers of numpy, and tensors of one element, too
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return value if abs(value) <= _LARGEST else None  # NaN is not


def missing_columns(functions: RewardFunctions, rows: Sequence[Mapping[str, Any]]) -> dict[str, RewardFunction]:
    """Columns that functions need and that none of `rows` has, with one such function each."""
    there = {name for row in rows for name in row}
    needed = {name: f for f in functions.functions for name, needs in f.columns.items() if needs}
    return {name: function for name, function in needed.items() if name not in there}
