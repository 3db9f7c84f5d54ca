"""Lines from a person or a pipe, and answers back.

Answers go to stdout, everything else to stderr, so that a pipe carries answers alone. Whatever is shown is harmless to
a terminal. Left out: colours, and a history of lines that outlives the program.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO

from rlhf.tracking.text_table import printable

with contextlib.suppress(ImportError):  # line editing, where the platform has it: input() uses what is imported
    import readline  # noqa: F401

_CONTINUED = "\\"
_PROMPT, _MORE = "> ", ". "


def harmless(text: str) -> str:
    """`text` with its lines and tabs, and every other control character written as an escape."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


class Terminal:
    """Standard input, output and error, whatever they are connected to."""

    def __init__(self) -> None:
        """Text that cannot be decoded or encoded is replaced, never an error."""
        self.interactive = bool(sys.stdin and sys.stdin.isatty())
        self._at_line_start = True
        for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors=errors)

    def read(self) -> str | None:
        """The next message, lines that end with a backslash joined with what follows; None at the end."""
        lines: list[str] = []
        while True:
            line = self._line(_MORE if lines else _PROMPT)
            if line is None:
                return "\n".join(lines) if lines else None
            if not line.endswith(_CONTINUED):
                return "\n".join([*lines, line])
            lines.append(line.removesuffix(_CONTINUED))

    def say(self, text: str) -> None:
        """A piece of an answer, on stdout at once."""
        if text:
            self._write(sys.stdout, text)
            self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """Go to a new line on stdout, unless an answer has just done so."""
        if not self._at_line_start:
            self.say("\n")

    def end_answer(self, answer: str) -> None:
        """End the last line of an answer; in a pipe, one without text is an empty line."""
        if not self._at_line_start or not (answer or self.interactive):
            self.say("\n")

    def note(self, text: str) -> None:
        """Something that is no answer, in lines of its own on stderr."""
        self.end_line()
        self._write(sys.stderr, f"{text}\n")

    def _write(self, stream: TextIO, text: str) -> None:
        stream.write(harmless(text))
        stream.flush()

    def _line(self, prompt: str) -> str | None:
        try:
            if self.interactive and sys.stdout.isatty():
                return input(prompt)
            if self.interactive:  # input() would write its prompt among the answers
                self._write(sys.stderr, prompt)
            line = sys.stdin.readline() if sys.stdin else ""
        except (EOFError, OSError):  # the end, or a terminal that has gone
            line = ""
        if not line and self.interactive:
            self._write(sys.stderr, "\n")  # the shell goes on below our prompt
        return line.removesuffix("\n").removesuffix("\r") if line else None
