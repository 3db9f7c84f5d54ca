"""The rows of a data set, the checks of their columns and values, and the one error that names all bad rows.

See also: `rlhf/text/tokenize_rows.py`, which checks the roles of a conversation.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from rlhf.text.chat_template import Row

KNOWN_COLUMNS = (
    *("messages", "prompt", "completion", "chosen", "rejected", "text", "margin"),
    *("tools", "chat_template_kwargs"),
)
DEMONSTRATION_COLUMNS = (("messages",), ("prompt", "completion"), ("chosen", "rejected"), ("text",))
PREFERENCE_COLUMNS = (("chosen", "rejected"),)
PROMPT_COLUMNS = (("messages",), ("chosen", "rejected"), ("prompt",))
SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class BadRow:
    """Stands in for a row that cannot be read or used."""

    reason: str


@dataclass(frozen=True)
class SkippedRow(BadRow):
    """Stands in for a row that its data set's map leaves out, which is no error."""


@dataclass(frozen=True)
class ColumnSelection:
    """Which columns of a file are kept, and under which name."""

    renamed: Mapping[str, str]
    """Our name -> the file's, if they differ."""
    wanted: Collection[str] | None = None
    """Our names; None keeps all columns."""

    def our_names(self, found: Sequence[str]) -> dict[str, str]:
        """The file's name -> ours, without columns whose name is taken by a renamed one."""
        ours = {theirs: name for name, theirs in self.renamed.items()}
        return {name: ours.get(name, name) for name in found if name in ours or name not in self.renamed}

    def kept(self, found: Sequence[str]) -> dict[str, str]:
        """`our_names` of the wanted columns; raises ValueError if the file has one of them twice."""
        names = self.our_names(found).items()
        kept = {theirs: ours for theirs, ours in names if self.wanted is None or ours in self.wanted}
        twice = [theirs for theirs in kept if list(found).count(theirs) > 1]
        if twice:
            raise ValueError(f"found columns {[*found]}; {twice} is there more than once, expected each name once.")
        return kept


@dataclass(frozen=True)
class FileRows:
    """The rows of one file, with only the selected columns, under our names."""

    file: str
    found: Sequence[str]
    """All columns of the file, under its own names."""
    rows: Sequence[Row | BadRow]


@dataclass(frozen=True)
class SourceRows:
    """The rows of all files of a source, one file after the other."""

    files: Sequence[FileRows]

    @cached_property
    def found(self) -> list[str]:
        """All columns, under the names in the files; a column may be missing in some of them."""
        return [*dict.fromkeys(name for file in self.files for name in file.found)]

    @cached_property
    def _ends(self) -> list[int]:
        return [*accumulate(len(file.rows) for file in self.files)]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Row | BadRow:
        file, row = self._locate(number)
        return file.rows[row]

    def place(self, number: int) -> str:
        """Where a row is, for messages: its number in its file, and the file if there are several."""
        file, row = self._locate(number)
        return f"{row} of {file.file}" if len(self.files) > 1 else str(row)

    def _locate(self, number: int) -> tuple[FileRows, int]:
        index = bisect_right(self._ends, number)
        return self.files[index], number - (self._ends[index - 1] if index else 0)


def further_columns(row: Row) -> dict[str, Any]:
    """The columns that only the user's own functions read, such as a reference answer."""
    return {name: value for name, value in row.items() if name not in KNOWN_COLUMNS}


def require_columns(found: Sequence[str], alternatives: Sequence[Sequence[str]], *, where: str) -> None:
    """Raise ValueError unless all columns of one alternative were found in the source called `where`."""
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
    """Raise ValueError unless `row` fills the columns of one alternative with text or messages."""
    filled = [names for names in alternatives if all(row.get(name) is not None for name in names)]
    if not filled:
        full = [name for name, value in row.items() if value is not None]
        raise ValueError(f"only {full} hold something; expected {_either(alternatives)}.")
    for name in filled[0]:
        _check_value(row[name], name)
    if row.get("prompt") is not None:
        _check_value(row["prompt"], "prompt")
    if "chosen" in filled[0] and row["chosen"] == row["rejected"]:
        raise ValueError("`chosen` and `rejected` are identical; expected one to be better.")
    margin_of(row)


def margin_of(row: Row) -> float:
    """How much better the chosen response was rated; 0 if the data does not say."""
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


def _check_value(value: Any, name: str) -> None:
    if isinstance(value, list) and name != "text":
        if not value:
            raise ValueError(f"`{name}` is an empty list; expected messages.")
        for number, message in enumerate(value):
            _check_message(message, f"{name}[{number}]")
        if not (value[-1].get("content") or "").strip() and not value[-1].get("tool_calls"):
            raise ValueError(f"`{name}` ends with an empty message; expected text.")
    elif not isinstance(value, str) or name == "messages":
        expected = {"messages": "a list of messages", "text": "text"}.get(name, "text or a list of messages")
        raise ValueError(f"`{name}` is {shortened(repr(value))}; expected {expected}.")
    elif not value.strip():
        raise ValueError(f"`{name}` is empty; expected text.")


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"`{name}` is {shortened(repr(message))}; expected {{'role': ..., 'content': ...}}.")
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"`{name}.content` is {shortened(repr(content))}; expected text.")


def shortened(text: str) -> str:
    """The beginning of `text` for a message; halves of characters become question marks."""
    readable = text[:81].encode(errors="replace").decode()
    return readable if len(readable) <= 80 else readable[:77] + "..."


def bad_rows_report(bad: Sequence[tuple[str, BadRow]], *, where: str, num_rows: int) -> str:
    """The error message about rows that cannot be used: their places, by reason.

    Args:
        bad: Each bad row with its place in the data set.
        where: Dotted name and path of the source.
        num_rows: How many rows were looked at, good ones included.
    """
    places: dict[str, list[str]] = {}
    for place, row in bad:
        places.setdefault(row.reason, []).append(place)
    lines = [f"  row {_first_of(rows)}: {reason}" for reason, rows in [*places.items()][:SHOWN_PROBLEMS]]
    lines += [f"  and {len(places) - SHOWN_PROBLEMS} more reasons"] * (len(places) > SHOWN_PROBLEMS)
    setting = ".".join([*where.split(".")[:2], "bad_rows"])
    head = f"{where}: {len(bad)} of {num_rows} rows cannot be used (from row 0); repair them or set {setting}=drop:"
    return "\n".join([head, *lines])


def _first_of(places: Sequence[str]) -> str:
    more = f" and {len(places) - SHOWN_PROBLEMS} more" if len(places) > SHOWN_PROBLEMS else ""
    return ", ".join(places[:SHOWN_PROBLEMS]) + more
