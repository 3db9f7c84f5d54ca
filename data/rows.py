"""What a row must hold before it is tokenised: columns, types, text, messages.

Every problem of a data set is collected, so that one error names them all. Which roles a conversation may have is the
business of `rlhf/text/tokenizer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from rlhf.text.tokenizer import Row

COLUMNS = (
    *("messages", "prompt", "completion", "chosen", "rejected", "text", "margin"),
    *("tools", "chat_template_kwargs"),
)
DEMONSTRATION = (("messages",), ("prompt", "completion"), ("chosen", "rejected"), ("text",))
PREFERENCE = (("chosen", "rejected"),)
PROMPT = (("messages",), ("chosen", "rejected"), ("prompt",))
SHOWN_PROBLEMS = 5

Result = TypeVar("Result")


class BrokenRow(dict[str, str]):
    """Stands where a row could not be read, and says why as `problem`."""


def require_columns(found: Sequence[str], alternatives: Sequence[Sequence[str]], *, where: str) -> None:
    """Raise ValueError unless all columns of one alternative were found.

    Args:
        found: Columns of the data set.
        alternatives: Sets of columns, one of which is needed.
        where: Dotted name of the source, such as `data.sft.train[0]`.
    """
    if not any(set(names) <= set(found) for names in alternatives):
        likely = next((names for names in alternatives if "prompt" in names), alternatives[-1])
        raise ValueError(
            f"{where}: found columns {[*found]}; expected {_either(alternatives)}. "
            f"Where yours have other names, give the source as {{path: FILE, "
            f"columns: {{{', '.join(f'{name}: ITS_NAME' for name in likely)}}}}}, in quotes."
        )


def _either(alternatives: Sequence[Sequence[str]]) -> str:
    return ", or ".join(" and ".join(names) for names in alternatives)


def check_row(row: Row, alternatives: Sequence[Sequence[str]]) -> None:
    """Raise ValueError unless `row` fills one alternative, and fills it with text or messages."""
    filled = [names for names in alternatives if all(row.get(name) is not None for name in names)]
    if not filled:
        full = [name for name, value in row.items() if value is not None]
        raise ValueError(f"only {full} hold something; expected {_either(alternatives)}.")
    for name in filled[0]:
        _check_part(row[name], name)
    if row.get("prompt") is not None:
        _check_part(row["prompt"], "prompt")
    if "chosen" in filled[0] and row["chosen"] == row["rejected"]:
        raise ValueError("`chosen` and `rejected` are identical; expected one to be better.")
    margin_of(row)


def margin_of(row: Row) -> float:
    """How much better the chosen response was judged; 0 where the data does not say."""
    margin = row.get("margin")
    if margin is None or margin == "":
        return 0.0
    try:
        value = float(margin)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`margin` is {margin!r}; expected a number.") from error
    if not math.isfinite(value):
        raise ValueError(f"`margin` is {margin!r}; expected a finite number.")
    return value


def _check_part(value: Any, name: str) -> None:
    if isinstance(value, list) and name != "text":
        if not value:
            raise ValueError(f"`{name}` is an empty list; expected messages.")
        for number, message in enumerate(value):
            _check_message(message, f"{name}[{number}]")
        if not (value[-1].get("content") or "").strip() and not value[-1].get("tool_calls"):
            raise ValueError(f"`{name}` ends with an empty message; expected text.")
    elif not isinstance(value, str) or name == "messages":
        expected = {"messages": "a list of messages", "text": "text"}.get(name, "text or a list of messages")
        raise ValueError(f"`{name}` is {_shown(value)}; expected {expected}.")
    elif not value.strip():
        raise ValueError(f"`{name}` is empty; expected text.")


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"`{name}` is {_shown(message)}; expected {{'role': ..., 'content': ...}}.")
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"`{name}.content` is {_shown(content)}; expected text.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def each_row(
    rows: Iterable[Row], function: Callable[[Row], Result], *, places: Iterable[str], where: str
) -> list[Result]:
    """`function` of every row.

    Args:
        rows: What it is called with.
        function: Raises ValueError for a row that cannot be used.
        places: Where each row stands in its data set, for the message.
        where: Dotted name and path of the source, for the message.

    Raises:
        ValueError: With the numbers of all rows that cannot be used, by reason.
    """
    results: list[Result] = []
    problems: dict[str, list[str]] = {}
    for place, row in zip(places, rows, strict=True):
        try:
            results.append(function(row))
        except ValueError as error:
            problems.setdefault(str(error), []).append(place)
    if problems:
        raise ValueError(_report(problems, where=where, num_rows=len(results) + sum(map(len, problems.values()))))
    return results


def _report(problems: dict[str, list[str]], *, where: str, num_rows: int) -> str:
    reasons = [f"  row {_numbers(rows)}: {reason}" for reason, rows in problems.items()]
    hidden = len(reasons) - SHOWN_PROBLEMS
    lines = reasons[:SHOWN_PROBLEMS] + [f"  and {hidden} more reasons"] * (hidden > 0)
    bad = sum(map(len, problems.values()))
    setting = ".".join([*where.split(".")[:2], "bad_rows"])
    head = f"{where}: {bad} of {num_rows} rows cannot be used (from row 0); repair them or set {setting}=drop:"
    return "\n".join([head, *lines])


def _numbers(rows: list[str]) -> str:
    more = f" and {len(rows) - SHOWN_PROBLEMS} more" if len(rows) > SHOWN_PROBLEMS else ""
    return ", ".join(rows[:SHOWN_PROBLEMS]) + more
