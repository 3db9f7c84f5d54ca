"""Finds the commands in a shell script, as far as scripts that start a training use the shell; nothing is run.

It follows assignments, `$1`, `${NAME:-default}`, `if [ ... ]`, quotes, comments and lines that a backslash continues.
A loop, `case` or a function is refused, with its line: what it does cannot be told without running it; `$(...)` stays
as it is written.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?[-=]([^}]*))?\}|(\w+))")
STARTERS = ("deepspeed", "accelerate", "torchrun", "trl", "python", "python3")
REDIRECTION = re.compile(r"\s(?:&>>?|\d?>>?(?:&\d)?|\|&?|<|&)(?:\s|$)|\s[&\d]?>>?\S")
QUOTED = re.compile(r"""'[^']*'|"(?:[^"\\]|\\.)*"|[^'"]+""", re.DOTALL)
"""A text in parts: each in single quotes, in double quotes, or without any."""
REFUSED = re.compile(r"(?:for|while|until|case|function|select)\b|\w+\s*\(\)")


def commands(text: str, arguments: Sequence[str] = ()) -> list[list[str]]:
    """The commands of a script that start a program, each as its words.

    Args:
        text: The script, or one command.
        arguments: What the script is started with: $1 and so on.

    Raises:
        ValueError: The script has a loop or another construct that is not followed.
    """
    script = _Script({str(number): word for number, word in enumerate(arguments, 1)})
    for number, line in _statements(text):
        script.follow(line, number)
    return script.found


@dataclass
class _Script:
    variables: dict[str, str]
    found: list[list[str]] = field(default_factory=list)
    branches: list[bool | None] = field(default_factory=list)
    """For each `if` around: whether its branch is followed; None once another was."""

    def follow(self, line: str, number: int) -> None:
        """One statement."""
        word, _, rest = line.partition(" ")
        if word in ("then", "else") and rest.strip():
            self.follow(word, number)
            self.follow(rest.strip(), number)
        elif word in ("if", "elif", "else", "fi", "then"):
            self._branch(word, line)
        elif all(self.branches):
            if REFUSED.match(line):
                raise ValueError(
                    f"line {number}: {line[:60]!r} is not followed, as nothing is run; give the command that it starts."
                )
            words = shlex.split(line)
            if all(map(ASSIGNMENT.fullmatch, words[words[0] == "export" :])):
                for name, _, value in (self.expanded(part).partition("=") for part in words[words[0] == "export" :]):
                    self.variables[name] = " ".join(value.split())
            else:
                self._command(line)

    def _branch(self, word: str, line: str) -> None:
        if word == "if":
            self.branches.append(self._holds(line) if all(self.branches) else None)
        elif word == "fi":
            self.branches.pop()
        elif word in ("elif", "else"):
            last = self.branches.pop()
            follow = self._holds(line) if word == "elif" else True
            self.branches.append(None if last or last is None else follow)

    def _holds(self, line: str) -> bool:
        """Whether the condition `[ A == B ]`, `[ -z A ]` or `[ -n A ]` is true."""
        words = shlex.split(self.expanded(line.removesuffix("then").rstrip(" ;")))[1:]
        words = [word for word in words if word not in ("[", "]", "[[", "]]")]
        match words:
            case [left, "==" | "=" | "-eq", right]:
                return left == right
            case [left, "!=" | "-ne", right]:
                return left != right
            case ["-z", value]:
                return not value
            case ["-n", value]:
                return bool(value)
            case ["-n"]:
                return False
            case ["-z"]:
                return True
        raise ValueError(f"the condition {line!r} is not followed, as nothing is run; give the command that it starts.")

    def expanded(self, text: str) -> str:
        """`text` with its variables, except in single quotes; what is not set is empty, as in the shell."""

        def value(match: re.Match[str]) -> str:
            return self.variables.get(match[1] or match[3]) or match[2] or ""

        return "".join(part if part.startswith("'") else VARIABLE.sub(value, part) for part in QUOTED.findall(text))

    def _command(self, line: str) -> None:
        text = self.expanded(line)
        parts = [part if part[0] in "'\"" else REDIRECTION.sub("\0", f"{part} ") for part in QUOTED.findall(text)]
        words = shlex.split("".join(parts).partition("\0")[0], comments=True)
        while words and ASSIGNMENT.fullmatch(words[0]):  # the environment of this command alone
            words.pop(0)
        if words and words[0].rpartition("/")[2] in STARTERS:
            self.found.append(words)


def _statements(text: str) -> list[tuple[int, str]]:
    """Each statement with its line: continued lines and quoted line breaks joined, comments left out."""
    found: list[tuple[int, str]] = []
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        line = line if pending and _is_open(pending) else _uncommented(line)
        start = start or number
        pending += line.rstrip() if not _is_open(pending + line) else line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
        elif _is_open(pending):
            pending += "\n"
        else:
            found += [(start, part) for part in _parts(pending) if part.strip()]
            pending, start = "", 0
    if pending.strip():
        found.append((start, pending))
    return [(number, line.strip()) for number, line in found]


def _parts(line: str) -> list[str]:
    """The commands of a line, cut at `;`, `&&` and `||`; a condition is left whole."""
    if re.match(r"\s*(el)?if\b", line):
        then = re.search(r";\s*(?=then\b)", line)
        return [line[: then.start()], *_parts(line[then.end() :])] if then else [line]
    parts = [part if part[0] in "'\"" else re.sub(r";|&&|\|\|", "\0", part) for part in QUOTED.findall(line)]
    return "".join(parts).split("\0")


def _uncommented(line: str) -> str:
    starts = (match.start() for match in re.finditer(r"(?:^|\s)#", line))
    return line[: next((start for start in starts if not _is_open(line[:start])), None)]


def _is_open(text: str) -> bool:
    """Whether a quotation mark is not closed yet."""
    try:
        shlex.split(text.removesuffix("\\"))
    except ValueError:
        return True
    return False
