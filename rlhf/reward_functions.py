"""Functions of the user's as reward sources, called as TRL's GRPOTrainer calls them.

A function is called with keyword arguments, each a list with one item per response: `prompts`, `completions`,
`completion_ids`, and further columns of the data by their names; it gets those that its signature names, and all of
them with `**kwargs`. Where a prompt is a list of messages, the prompt and the completion are such lists, else text. It
returns a list of numbers; None says that it does not apply to a response. `trainer_state` has `global_step` and
`max_steps`, counted in iterations, and `log_metric(name, value)` logs a mean as `reward/log/NAME`. Functions may be
async. Left out: TRL's `environments`, and its table of completions: `log_extra` takes columns and does nothing.

    def correct(completions, answer, **kwargs):
        return [1.0 if reply.strip() == right else 0.0 for reply, right in zip(completions, answer)]

See also: `reward_calls.py`, which calls all functions of a stage, and docs/rewards.md for users.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from rlhf.runtime.user_functions import load_function

LogMetric = Callable[[str, float], None]
"""Takes the name of a metric and its value."""

_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
_MADE_FOR_A_CALL = ("completions", "completion_ids")
_LACKING = ("prompt", "completion", "environments")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_LARGEST = float(torch.finfo(torch.float32).max)
_SIGNATURE = "called with prompts, completions and columns of the data by name, and returning one number for each"


@dataclass(frozen=True)
class RewardRows:
    """Responses as functions see them, B of each."""

    prompts: Sequence[Any]
    """Text or messages."""
    completions: Sequence[str]
    completion_ids: Sequence[list[int]]
    columns: Sequence[Mapping[str, Any] | None]
    """Further columns of the data; None for a response that no function is asked about."""
    step: int = 0
    """Iterations finished so far."""
    total_steps: int = 0

    @classmethod
    def of(
        cls,
        columns: Sequence[Mapping[str, Any] | None],
        *,
        texts: Sequence[str],
        token_ids: Sequence[list[int]],
        step: int = 0,
        total_steps: int = 0,
    ) -> RewardRows:
        """Responses to prompts whose `columns` also hold the prompt as it was given."""
        prompts = [(row or {}).get("prompt", "") for row in columns]
        return cls(prompts, list(texts), token_ids, columns, step, total_steps)

    def __len__(self) -> int:
        return len(self.completions)

    def rows(self, numbers: Sequence[int]) -> RewardRows:
        """Some of them."""
        return replace(
            self,
            prompts=[self.prompts[number] for number in numbers],
            completions=[self.completions[number] for number in numbers],
            completion_ids=[self.completion_ids[number] for number in numbers],
            columns=[self.columns[number] for number in numbers],
        )

    def arguments(self) -> dict[str, Any]:
        """What a function may be given of them; prompts and columns are those of the data, not copies."""
        columns = [row or {} for row in self.columns]
        names = dict.fromkeys(name for row in columns for name in row if name != "prompt")
        replies = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.prompts, self.completions, strict=True)
        ]
        return {
            **{name: [row.get(name) for row in columns] for name in names},
            "prompts": list(self.prompts),
            "completions": replies,
            "completion_ids": [list(ids) for ids in self.completion_ids],
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
        if inspect.isclass(function):
            raise ValueError(
                f"{setting}: found a class; expected a function, {_SIGNATURE}. Name an object of it that can be "
                f"called, such as one that its file has made with `scorer = {function.__name__}()`."
            )
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

    def arguments(self, rows: RewardRows, *, log_metric: LogMetric) -> dict[str, Any]:
        """What it is called with, as copies of its own; a column that only some rows have is None in the others."""
        given = rows.arguments()
        missing = {name: [None] * len(rows) for name, needs in self.columns.items() if needs and name not in given}
        found = {name: value for name, value in given.items() if self._takes(name)} | missing
        # Copies, because a function may change what it is given, and the data are read again in the next epoch.
        found |= {
            name: deepcopy(value) for name, value in found.items() if name not in ("completions", "completion_ids")
        }
        state = SimpleNamespace(global_step=rows.step, max_steps=rows.total_steps)
        own = {"trainer_state": state, "log_metric": log_metric, "log_extra": _ignored}
        return found | {name: value for name, value in own.items() if self._takes(name)}

    def _takes(self, name: str) -> bool:
        return self.takes_all or name in self.parameters


def _ignored(column: str, values: Sequence[Any]) -> None:
    """In place of TRL's `log_extra`."""


class NoScoresError(ValueError):
    """A function returned something other than one score for each response."""


def parsed_scores(output: Any, function: RewardFunction, *, rows: RewardRows) -> list[float]:
    """What a function returned, as finite numbers; NaN where it was None. A generator runs here.

    Raises:
        NoScoresError: it is no list of one score for each response.
    """
    expected = f"expected a list of {len(rows)} scores, each a finite number, or None where it does not apply"
    if not isinstance(output, Iterable) or isinstance(output, str | bytes | Mapping | Set):
        raise NoScoresError(f"{function.setting} returned {_shortened(output)}; {expected}.")
    scores = list(output)
    if len(scores) != len(rows):
        raise NoScoresError(f"{function.setting} returned {len(scores)} scores for {len(rows)} responses; {expected}.")
    for number, score in enumerate(scores):
        scores[number] = math.nan if score is None else _number(score)
        if scores[number] is None:
            raise NoScoresError(
                f"{function.setting} returned {_shortened(score)} for {rows.shown(number)}; {expected}."
            )
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
