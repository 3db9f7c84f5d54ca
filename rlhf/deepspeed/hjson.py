"""Reads JSON as DeepSpeed does: by the rules of Hjson, which allow comments and missing quotes and commas.

Comments are `# ...`, `// ...` and `/* ... */`. A text without quotes goes to the end of its line. Every key keeps the
line it stands on, so that what is wrong with it can be pointed at. A key that occurs twice is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SPACE = re.compile(r"(?:[ \t\r\n\ufeff]+|(?:#|//)[^\r\n]*|/\*.*?\*/)*", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?P<fraction>\.\d+)?(?P<exponent>[eE][-+]?\d+)?")
_WORD_END = re.compile(r"[ \t]*(?=[,}\]#\r\n]|//|/\*|\Z)")
_LINE = re.compile(r"[^\r\n]*")
_BARE_KEY = re.compile(r"[^\s:,{}\[\]]+(?=\s*:)")
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_WORDS = {"true": True, "false": False, "null": None}
_WHOLE = 1e10  # a float below it that is whole is read as an integer: 5e8
_DEPTH = 100

Path = tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """What a file says, and where."""

    name: str
    content: dict[str, Any]
    """Under present names, once old ones have been made new."""
    lines: dict[Path, int] = field(default_factory=dict)
    written: dict[Path, Any] = field(default_factory=dict)
    """Every value that is not an object, under the path that it has in the file."""
    became: dict[Path, Path] = field(default_factory=dict)
    """Path in `content` of what is written under another."""
    idle: dict[Path, str] = field(default_factory=dict)
    """What is written and not in `content`, with the reason."""
    files: dict[Path, str] = field(default_factory=dict)
    """The file of what is not written in `name`."""
    notes: list[str] = field(default_factory=list)
    """What is to be said about it."""

    def where(self, path: Path) -> str:
        """The place of a key of `content`, as an error names it: file, line, dotted name as it is written."""
        path = self.written_at(path)[0]
        line = self.lines.get(path)
        return f"{self.files.get(path, self.name)}{f':{line}' if line else ''}: {'.'.join(path)}"

    def written_at(self, path: Path) -> list[Path]:
        """The paths in the file that a path of `content` comes from; itself, where none does."""
        others = [old for old, new in self.became.items() if new == path]
        return [path, *others] if path in self.written or not others else others

    def move(self, path: Path, new: Path) -> None:
        """Note that what is at `path` goes to `new`."""
        self.became.update(dict.fromkeys(self.written_at(path), new))


def leaves(part: Mapping[Any, Any], parents: Path = ()) -> dict[Path, Any]:
    """Every value that is not an object, by its path."""
    found: dict[Path, Any] = {}
    for name, value in part.items():
        path = (*parents, str(name))
        found |= leaves(value, path) if isinstance(value, Mapping) else {path: value}
    return found


def parse(text: str, *, name: str) -> Document:
    """Read a text whose top level is an object, with or without its braces.

    Args:
        text: the text.
        name: what errors call it.

    Raises:
        ValueError: file and line, what was found and what was expected.
    """
    reader = _Reader(text, name)
    content = reader.root()
    return Document(name, content, reader.lines)


def has_braces(text: str) -> bool:
    """Whether a text is an object with its braces, which YAML can be read as as well."""
    match = _SPACE.match(text)
    return match is not None and text.startswith("{", match.end())


class _Reader:
    def __init__(self, text: str, name: str) -> None:
        self.lines: dict[Path, int] = {}
        self._text = text
        self._name = name
        self._at = 0

    def root(self) -> dict[str, Any]:
        self._skip()
        if self._peek() == "":
            raise self._error("is empty", "an object with settings, as in {...}")
        if self._peek() == "[":
            raise self._error("found a list", "an object with settings, as in {...}")
        braces = self._take("{")
        content = self._members((), end="}" if braces else "")
        self._skip()
        if self._peek():
            raise self._error(f"found {self._rest()!r} after the end", "one object and nothing else")
        return content

    def _members(self, path: Path, *, end: str) -> dict[str, Any]:
        """Keys and values up to `end`, which is consumed."""
        start, members = self._at, {}
        while not self._ends(end, start, what="object"):
            line, key = self._line(), self._key()
            here = (*path, key)
            if key in members:
                raise ValueError(
                    f"{self._name}:{line}: {'.'.join(here)} is there twice, first on line {self.lines[here]}; "
                    f"expected each key once. Remove one of them."
                )
            self.lines[here] = line
            self._expect_colon(key)
            members[key] = self._value(here)
            self._comma()
        return members

    def _items(self, path: Path) -> list[Any]:
        start, items = self._at, []
        while not self._ends("]", start, what="list"):
            items.append(self._value((*path, str(len(items)))))
            self._comma()
        return items

    def _ends(self, end: str, start: int, *, what: str) -> bool:
        self._skip()
        if self._peek() == "" and end:
            raise self._error(
                f"the {what} opened on line {self._line(start)} never ends", f"{end!r} before the end of the file"
            )
        return self._peek() == "" if end == "" else self._take(end)

    def _comma(self) -> None:
        self._skip()
        self._take(",")

    def _expect_colon(self, key: str) -> None:
        self._skip()
        if not self._take(":"):
            raise self._error(f"found {self._rest()!r} after the key {key!r}", "':' and a value")
        self._skip()

    def _key(self) -> str:
        if self._peek() in ('"', "'"):
            return self._quoted()
        match = _BARE_KEY.match(self._text, self._at)
        if match is None:
            raise self._error(f"found {self._rest()!r}", "a key and ':'; is a bracket or a quote missing before it?")
        self._at = match.end()
        return match.group()

    def _value(self, path: Path) -> Any:
        self._skip()
        if len(path) > _DEPTH:
            raise self._error("is nested too deeply", f"at most {_DEPTH} levels")
        if self._text.startswith("'''", self._at):
            return self._lines_of_text()
        if self._peek() in ('"', "'"):
            return self._quoted()
        if self._take("{"):
            return self._members(path, end="}")
        if self._take("["):
            return self._items(path)
        if self._peek() in ("", "}", "]", ",", ":"):
            raise self._error(f"found {self._rest()!r}", f"a value of {'.'.join(path)}")
        return self._bare()

    def _bare(self) -> Any:
        """A word of JSON or a number where nothing follows it; else all of the line, as a text."""
        for word, value in _WORDS.items():
            if self._text.startswith(word, self._at) and self._word_ends(self._at + len(word)):
                return value
        number = _NUMBER.match(self._text, self._at)
        if number and self._word_ends(number.end()):
            return _number(number)
        line = _LINE.match(self._text, self._at)
        assert line is not None
        self._at = line.end()
        return line.group().strip()

    def _word_ends(self, at: int) -> bool:
        match = _WORD_END.match(self._text, at)
        if match is None:
            return False
        self._at = match.end()
        return True

    def _quoted(self) -> str:
        quote, start = self._peek(), self._at
        self._at += 1
        parts: list[str] = []
        while not self._take(quote):
            character = self._peek()
            if character in ("", "\n", "\r"):
                self._at = start
                raise self._error(f"the text {self._rest()} never ends", f"{quote} on the same line")
            self._at += 1
            parts.append(self._escape() if character == "\\" else character)
        # Two halves of a character outside the basic plane are one character.
        return "".join(parts).encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _escape(self) -> str:
        character = self._peek()
        self._at += 1
        digits = self._text[self._at : self._at + 4]
        if character == "u" and re.fullmatch(r"[0-9a-fA-F]{4}", digits):
            self._at += 4
            return chr(int(digits, 16))
        if character not in {*_ESCAPES, '"', "'", "\\", "/"}:
            raise self._error(f"found the escape \\{character}", 'one of \\" \\\\ \\/ \\b \\f \\n \\r \\t \\uXXXX')
        return _ESCAPES.get(character, character)

    def _lines_of_text(self) -> str:
        """A text in ''' that may have several lines, each less the indent of the first quote."""
        indent = self._at - (self._text.rfind("\n", 0, self._at) + 1)
        end = self._text.find("'''", self._at + 3)
        if end < 0:
            raise self._error("the text that ''' opens never ends", "'''")
        raw = self._text[self._at + 3 : end].replace("\r", "")
        self._at = end + 3
        first, *others = raw.split("\n")
        lines = [first.lstrip(" \t"), *(re.sub(rf"^[ \t]{{0,{indent}}}", "", line) for line in others)]
        return "\n".join(lines).removeprefix("\n").removesuffix("\n")

    def _skip(self) -> None:
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        if self._text.startswith("/*", self._at):
            raise self._error("the comment that /* opens never ends", "*/")

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, character: str) -> bool:
        found = self._peek() == character
        self._at += found
        return found

    def _rest(self) -> str:
        return (self._text[self._at : self._at + 30].splitlines() or ["the end"])[0]

    def _line(self, at: int | None = None) -> int:
        return self._text.count("\n", 0, self._at if at is None else at) + 1

    def _error(self, found: str, expected: str) -> ValueError:
        return ValueError(f"{self._name}:{self._line()}: {found}; expected {expected}.")


def _number(match: re.Match[str]) -> int | float:
    if not match["fraction"] and not match["exponent"]:
        return int(match.group())
    value = float(match.group())
    return int(value) if abs(value) < _WHOLE and value.is_integer() else value
