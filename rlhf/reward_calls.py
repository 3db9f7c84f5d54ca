"""Calls the reward functions of a stage: within their time, async ones at the same time, and what a failure does.

Every rank calls them with its own responses, and an error on one rank ends all of them with its message. See also:
`reward_functions.py` for what a function is given, and `rewards.py`, where the scores of all sources become one.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections import defaultdict
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rlhf.config.reward_config import RewardErrors, RewardSettings
from rlhf.reward_functions import LogMetric, NoScoresError, RewardFunction, RewardRows, parsed_scores
from rlhf.runtime.dist import agreed, gather_objects
from rlhf.runtime.errors import RunError
from rlhf.runtime.user_functions import TimeLimitError, call_within, described

log = logging.getLogger(__name__)

_GRACE_S = 1.0
"""Seconds after which a signal interrupts an async function that does not let go of the event loop."""
_FAILURES = (Exception, asyncio.CancelledError, SystemExit)
"""Whatever the user's code raises; a library may call sys.exit(), which must not end one rank silently."""


@dataclass(frozen=True)
class CallFailure:
    """Why a call gave no scores."""

    message: str
    cause: BaseException | None = None
    is_late: bool = False
    names_row: bool = True
    """Whether the message shows the response that is to blame, not just one of them."""


@dataclass(frozen=True)
class _Call:
    """A call of one function."""

    function: RewardFunction
    rows: RewardRows
    limit_s: float
    time_limit: str
    """`limit_s` for messages."""
    log_metric: LogMetric

    def begin(self) -> list[float] | CallFailure | Awaitable[Any]:
        """The scores, why there are none, or what gives them once it is awaited."""

        def scores_or_awaitable() -> list[float] | Awaitable[Any]:
            output = self.function.call(**self.function.arguments(self.rows, log_metric=self.log_metric))
            # Not asked of the function: a partial or a wrapper of an async one looks like a plain function.
            return output if inspect.isawaitable(output) else parsed_scores(output, self.function, rows=self.rows)

        try:
            return call_within(self.limit_s, scores_or_awaitable)
        except TimeLimitError as error:
            return self.late(self.function, cause=error)
        except _FAILURES as error:
            return self._failure(error)

    async def end(self, awaitable: Awaitable[Any]) -> list[float] | CallFailure:
        """Wait for what `begin` gave."""
        try:
            async with asyncio.timeout(self.limit_s) as limit:
                scores = parsed_scores(await awaitable, self.function, rows=self.rows)
        except _FAILURES as error:
            return self.late(self.function, cause=error) if limit.expired() else self._failure(error)
        return self.late(self.function) if limit.expired() else scores  # it has swallowed the cancellation

    def late(self, *functions: RewardFunction, cause: BaseException | None = None) -> CallFailure:
        names = " and ".join(function.setting for function in functions)
        message = f"{names} took longer than {self.time_limit} for {self._shown}."
        return CallFailure(message, cause, is_late=True, names_row=len(self.rows) == 1)

    def _failure(self, error: BaseException) -> CallFailure:
        if isinstance(error, NoScoresError):
            return CallFailure(str(error), error)
        message = f"{self.function.setting} raised {described(error)} on {self._shown}."
        return CallFailure(message, error, names_row=len(self.rows) == 1)

    @property
    def _shown(self) -> str:
        return f"{f'{len(self.rows)} responses, such as ' if len(self.rows) > 1 else ''}{self.rows.shown(0)}"


@dataclass
class RewardFunctions:
    """All functions of a stage."""

    functions: Sequence[RewardFunction]
    stage: str
    timeout_s: float
    on_error: RewardErrors
    _loop: asyncio.AbstractEventLoop | None = None
    """Runs async functions; the same one every time, as clients that they keep belong to it."""
    _logged: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """What functions have given to `log_metric`."""

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

        Every rank must call it equally often, also one that has no responses to ask about.

        Raises:
            RunError: a function failed on some rank, or took too long.
        """
        if not self.functions:
            return torch.zeros(len(rows), 0)
        scores = torch.full((len(rows), len(self.functions)), torch.nan)
        asked = [number for number, columns in enumerate(rows.columns) if columns is not None]
        with agreed() as outcome:
            rows = rows.rows(asked)
            for place, found in enumerate(self._called(self.functions, rows) if asked else ()):
                scores[asked, place] = torch.tensor(self._scores(self.functions[place], found, rows=rows))
        if outcome.error:
            raise RunError(outcome.error) from outcome.cause
        return scores

    def metrics(self) -> dict[str, float]:
        """The means of what was given to `log_metric` since this was last called; all ranks must call it."""
        joined: dict[str, list[float]] = defaultdict(list)
        for logged in gather_objects(dict(self._logged)) if self.functions else ():
            for name, values in logged.items():
                joined[f"reward/log/{name}"] += values
        self._logged.clear()
        return {name: fmean(values) for name, values in joined.items()}

    def _called(
        self, functions: Sequence[RewardFunction], rows: RewardRows, *, share: int = 1
    ) -> list[list[float] | CallFailure]:
        """What each function says of the rows in a `share`-th of the time, or why it says nothing."""
        limit_s, setting = self.timeout_s / share, f"{self.stage}.reward_timeout_s"
        shown = f"{setting}={limit_s:g} seconds" if share == 1 else f"{limit_s:.3g} seconds, its share of {setting},"
        calls = [_Call(function, rows, limit_s, shown, self._log_metric) for function in functions]
        begun = [call.begin() for call in calls]
        waiting = {place: found for place, found in enumerate(begun) if inspect.isawaitable(found)}
        ended = self._ended([(calls[place], found) for place, found in waiting.items()]) if waiting else []
        later = iter(ended)
        return [found if isinstance(found, list | CallFailure) else next(later) for found in begun]

    def _ended(self, waiting: Sequence[tuple[_Call, Awaitable[Any]]]) -> list[list[float] | CallFailure]:
        """What the async ones say, which wait at the same time."""
        loop = self._loop = self._loop or asyncio.new_event_loop()

        async def together() -> list[list[float] | CallFailure]:
            return await asyncio.gather(*(call.end(awaitable) for call, awaitable in waiting))

        first = waiting[0][0]
        try:
            return call_within(first.limit_s + _GRACE_S, lambda: loop.run_until_complete(together()))
        except TimeLimitError as error:
            for task in asyncio.all_tasks(loop):
                task.cancel()  # takes effect when the loop runs next
            return [first.late(*(call.function for call, _ in waiting), cause=error)] * len(waiting)

    def _scores(self, function: RewardFunction, found: list[float] | CallFailure, *, rows: RewardRows) -> list[float]:
        """The scores of a call; if it failed and failures are dropped, those of calls with one response each."""
        if isinstance(found, list):
            return found
        if self.on_error is RewardErrors.stop:
            # The time that looking for the response takes is limited, as a service may be down for all of them.
            others = () if found.names_row or found.is_late else self._alone(function, rows, share=len(rows))
            failures = (one for one in others if isinstance(one, CallFailure) and not one.is_late)
            failure = next(failures, found)
            raise RunError(f"{failure.message} {self._advice(failure)}") from failure.cause
        # After a time-out all of them together get the time of one call more.
        share = len(rows) if found.is_late else 1
        alone = [*self._alone(function, rows, share=share)] if len(rows) > 1 else [found]
        failed = [one for one in alone if isinstance(one, CallFailure)]
        if failed:
            log.warning("left out %d of %d responses: %s", len(failed), len(rows), failed[0].message)
        return [math.inf if isinstance(one, CallFailure) else one[0] for one in alone]

    def _alone(self, function: RewardFunction, rows: RewardRows, *, share: int) -> Iterator[list[float] | CallFailure]:
        for number in range(len(rows)):
            yield self._called([function], rows.rows([number]), share=share)[0]

    def _advice(self, failure: CallFailure) -> str:
        drop = f"or leave such responses out with {self.stage}.reward_on_error=drop."
        if failure.is_late:
            return f"See what it waits for, give its own requests a shorter time limit, raise that setting, {drop}"
        return f"Mend the function, let it return None for a response that it cannot score, {drop}"

    def _log_metric(self, name: str, value: float) -> None:
        self._logged[str(name)].append(float(value))


def missing_columns(functions: RewardFunctions, rows: Sequence[Mapping[str, Any]]) -> dict[str, RewardFunction]:
    """Columns that functions need and that none of `rows` has, with one such function each."""
    there = {name for row in rows for name in row}
    needed = {name: f for f in functions.functions for name, needs in f.columns.items() if needs}
    return {name: function for name, function in needed.items() if name not in there}
