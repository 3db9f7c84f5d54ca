"""Reads messages from a terminal or a pipe and writes answers, with nothing in them that could steer a terminal.

Answers go to stdout and everything else to stderr, so a pipe carries answers alone.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TextIO

from rlhf.tracking.text_table import printable

with contextlib.suppress(ImportError):  # line editing, where the platform has it: input() uses what is imported
    import readline  # noqa: F401


def escaped(text: str) -> str:
    """`text` with its line breaks and tabs, and every other control character written as an escape."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


class Terminal:
    """Standard input, output and error, whatever they are connected to."""

    def __init__(self) -> None:
        self.interactive = bool(sys.stdin and sys.stdin.isatty())
        self._at_line_start = True
        # Bytes that are not text, and text that the output cannot encode, are replaced instead of raising an error.
        for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors=errors)

    def read(self) -> str | None:
        """The next message; a backslash at the end of a line continues it on the next. None at the end of the input."""
        lines: list[str] = []
        while (line := self._read_line(". " if lines else "> ")) is not None:
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                break
        return "\n".join(lines) if lines else None

    def write(self, text: str) -> None:
        """Show a piece of an answer on stdout at once."""
        if text:
            self._show(sys.stdout, text)
            self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """Begin a new line on stdout, unless an answer has just done so."""
        if not self._at_line_start:
            self.write("\n")

    def end_answer(self, answer: str) -> None:
        """End the last line of an answer; in a pipe, an answer without text is an empty line."""
        if not self._at_line_start or not (answer or self.interactive):
            self.write("\n")

    def note(self, text: str) -> None:
        """Show something that is no answer, on lines of its own on stderr."""
        self.end_line()
        self._show(sys.stderr, f"{text}\n")

    def _show(self, stream: TextIO, text: str) -> None:
        stream.write(escaped(text))
        stream.flush()

    def _read_line(self, prompt: str) -> str | None:
        try:
            if self.interactive and sys.stdout.isatty():
                return input(prompt)
            if self.interactive:  # input() would write its prompt among the answers
                self._show(sys.stderr, prompt)
            line = sys.stdin.readline() if sys.stdin else ""
        except (EOFError, OSError):  # the end of the input, or a terminal that is gone
            line = ""
        if not line and self.interactive:
            self._show(sys.stderr, "\n")  # the shell continues below our prompt
        return line.removesuffix("\n").removesuffix("\r") if line else None


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """While this is open, the first Ctrl-C is only added to the yielded list; the second raises KeyboardInterrupt."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    earlier = signal.signal(signal.SIGINT, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, earlier)
