"""Tables of measurements, and the file of a benchmark, whose every part owns a section that a new run replaces."""

from __future__ import annotations

import os
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

from benchmarks.recipes import hardware

RESULT = Path(__file__).parent / "results/zero.md"
_TITLE = "# ZeRO: stages, offloading and the peer\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, lowest and highest; a dash where nothing was measured."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "–"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def write_section(part: str, text: str, *, result: Path, title: str = _TITLE, module: str = "zero") -> None:
    """Replace a part's section, or add it, under the command of `benchmarks.MODULE` that started this process."""
    head = f"`{_command(module)}`, {date.today()}, {hardware()}, load average at the end {os.getloadavg()[1]:.1f}."
    section = f"## {part}\n\n{head}\n\n{text.strip()}\n"
    known = result.read_text() if result.exists() else title
    title, *sections = re.split(r"^(?=## )", known, flags=re.MULTILINE)
    others = [other.strip() + "\n" for other in sections if not other.startswith(f"## {part}\n")]
    result.write_text("\n".join([title.strip() + "\n", *sorted([*others, section])]))


def _command(module: str) -> str:
    """The command without this machine's paths."""
    words = shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])
    words = re.sub(r" --(folder|records|result|peer-path)[ =]\S+", "", words)
    return re.sub(r"--peer[ =]\S+", "--peer PYTHON", words)
