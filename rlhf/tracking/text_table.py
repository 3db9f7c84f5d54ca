"""Text for a terminal: tables that fit it, readable numbers, and model output that cannot control it.

Left out: colours and frames, so that a table reads the same in a terminal, a log file and an issue.
"""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TypeGuard

_GAP = "  "
_NARROWEST = 8
_JOINERS = "\u200c\u200d"  # zero-width joiner and non-joiner: they only shape letters and emoji


def printable(text: str) -> str:
    """`text` as one line that cannot control a terminal.

    Control characters (newlines too), bidirectional overrides, line separators and lone surrogates are escaped.
    """
    if text.isprintable():  # nothing of the kind is in it, and it may be long
        return text
    return "".join(char if _harmless(char) else char.encode("unicode_escape").decode() for char in text)


def printable_lines(text: str) -> str:
    """The same for each line of a text."""
    return "\n".join(map(printable, text.split("\n")))


def number(value: float) -> str:
    """Format `value` with four significant digits and a comma between thousands."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def with_ends(mean: float, low: float, *, high: float) -> str:
    """Format a number with the ends of its interval: `0.2 [0.14, 0.26]`."""
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def table(title: str, columns: Sequence[str], *, rows: Iterable[Sequence[object]]) -> str:
    """A text table that fits the terminal: long cells are wrapped, columns of numbers are aligned right.

    Args:
        title: line above the table.
        columns: one heading per column.
        rows: one cell per column; None shows as `-`, text passes through `printable`.
    """
    cells = [list(row) for row in rows]
    texts = [[printable(name) for name in columns], *([_text(value) for value in row] for row in cells)]
    widths = _fit([max(map(_width, column)) for column in zip(*texts, strict=True)])
    right = [all(cell is None or _is_number(cell) for cell in column) for column in zip(*cells, strict=True)]
    right = right or [False] * len(columns)
    header, *body = [_lines(row, widths, right=right) for row in texts]
    rule = _GAP.join("-" * width for width in widths)
    return "\n".join([printable(title), *header, rule, *(line for lines in body for line in lines)])


def _harmless(char: str) -> bool:
    return char in _JOINERS or unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: object) -> str:
    if _is_number(value):
        return number(value)
    return "-" if value is None else printable(str(value))


def _width(text: str) -> int:
    """Terminal columns that `text` takes: two for a wide East Asian character, none for a combining mark."""
    return sum(map(_char_width, text))


def _char_width(char: str) -> int:
    if unicodedata.category(char) in {"Mn", "Me", "Cf"}:
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _fit(widths: list[int]) -> list[int]:
    """Narrow the widest columns until the table fits the terminal."""
    room = shutil.get_terminal_size((100, 24)).columns - len(_GAP) * (len(widths) - 1)
    widths = [min(width, max(room, _NARROWEST)) for width in widths]
    while sum(widths) > room and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    return widths


def _lines(row: Sequence[str], widths: Sequence[int], *, right: Sequence[bool]) -> list[str]:
    """The lines of one table row: as many as its longest cell needs."""
    cells = [_wrap(text, width) for text, width in zip(row, widths, strict=True)]
    lines = []
    for parts in zip_longest(*cells, fillvalue=""):
        gaps = [" " * (width - _width(part)) for part, width in zip(parts, widths, strict=True)]
        padded = [
            gap + part if is_right else part + gap for part, gap, is_right in zip(parts, gaps, right, strict=True)
        ]
        lines.append(_GAP.join(padded).rstrip())
    return lines


def _wrap(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` columns, broken at spaces if possible."""
    lines, used = [""], 0
    for word in re.findall(r"\S+\s*|\s+", text):
        if used and used + _width(word.rstrip()) > width:
            lines.append("")
            used = 0
        for char in word:
            if used + _char_width(char) > width and not char.isspace():
                lines.append("")
                used = 0
            lines[-1] += char
            used += _char_width(char)
    return [line.rstrip() for line in lines]
