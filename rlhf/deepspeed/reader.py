"""Reads a configuration from Hjson, YAML, url-safe base64 or a mapping, and keeps the line of every key.

Hjson is JSON with comments, and with or without quotes and commas; DeepSpeed reads its files with the same package.
A key that occurs twice is refused.
"""

from __future__ import annotations

import base64
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import hjson
import yaml
from hjson.decoder import JSONObject, make_scanner

from rlhf.deepspeed.keys import Path

_BRACE = re.compile(r"(?:\s|(?:#|//)[^\n]*|/\*.*?\*/)*\{", re.DOTALL)
_MERGE = "tag:yaml.org,2002:merge"
_YAML = (".yaml", ".yml")
_SHOWN, _REST = 200, 30  # characters of a long source, and of the rest of a line, in an error


@dataclass(frozen=True)
class Document:
    """A configuration, and where each of its values is written."""

    name: str
    content: dict[str, Any]
    """Nested; old names are replaced in `dialects.py`."""
    places: dict[Path, str] = field(default_factory=dict)
    """File and line of the keys that are written."""
    written: dict[Path, Any] = field(default_factory=dict)
    """Every value that is not an object, by its path in the file."""
    renamed: dict[Path, Path] = field(default_factory=dict)
    """Path in `content` of what is written under another path."""
    unused: dict[Path, str] = field(default_factory=dict)
    """Paths in the file that are not in `content`, with the reason."""
    notes: list[str] = field(default_factory=list)
    """Warnings."""
    named_by: str | None = None
    """The file of Accelerate that names this one."""

    def where(self, path: Path) -> str:
        """Where a key of `content` is written, for messages: file, line, dotted name."""
        path = self.written_at(path)[0]
        return f"{self.places.get(path, self.name)}: {'.'.join(path)}"

    def written_at(self, path: Path) -> list[Path]:
        """The paths in the file that a path of `content` comes from; itself, where none does."""
        others = [old for old, new in self.renamed.items() if new == path]
        return [path, *others] if path in self.written or not others else others

    def rename(self, path: Path, new: Path) -> None:
        """Note that what was at `path` is now at `new`."""
        self.renamed.update(dict.fromkeys(self.written_at(path), new))


def leaves(part: Mapping[Any, Any], parents: Path = ()) -> dict[Path, Any]:
    """Every value that is not an object, by its path."""
    found: dict[Path, Any] = {}
    for name, value in part.items():
        path = (*parents, str(name))
        found |= leaves(value, path) if isinstance(value, Mapping) else {path: value}
    return found


def read(source: Any, *, setting: str) -> Document:
    """What a setting names: a file, base64 of its text, or a mapping.

    Args:
        source: the value of the setting.
        setting: its dotted name, for errors.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    if isinstance(source, Mapping):
        written = leaves(source)
        content = {str(key): value for key, value in source.items()}
        return Document(setting, content, dict.fromkeys(written, setting), written)
    if not isinstance(source, str) or not source.strip():
        raise ValueError(f"{setting}={source!r}: expected a DeepSpeed JSON file, or its content as a mapping.")
    path = FilePath(source)
    path = path.expanduser() if source.startswith(("~/", "~\\")) else path
    if not _exists(path, FilePath.is_file):
        text = _decoded(source)
        if text is None:
            raise ValueError(_no_file(path, setting))
        return parse(text, name=f"{setting} (base64)")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not a text in UTF-8 ({error.reason} at byte {error.start}).") from error
    return parse(text, name=path.name, is_yaml=path.suffix.lower() in _YAML)


def is_accelerates(content: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of Hugging Face Accelerate."""
    marks = ("compute_environment", "distributed_type", "main_training_function", "deepspeed_config")
    return any(name in content for name in marks)


def parse(text: str, *, name: str, is_yaml: bool = False) -> Document:
    """Read a text: with braces it is Hjson; without, YAML where it is called so, or is Accelerate's.

    Args:
        text: the text.
        name: what errors call it.
        is_yaml: whether its file is called YAML.

    Raises:
        ValueError: file and line, what was found and what was expected.
    """
    has_braces = _BRACE.match(text) is not None
    try:
        document = _document(_yaml(text, name) if is_yaml and not has_braces else _hjson(text, name), name)
        if not has_braces and not is_yaml and is_accelerates(document.content):
            return _document(_yaml(text, name), name)
    except RecursionError:
        raise ValueError(f"{name}: is nested too deeply.") from None
    return document


class _Members(list[tuple[str, int, Any]]):
    """An object as it is written: name, line and value of each key, in order, and twice where it is there twice."""


class _Decoder(hjson.HjsonDecoder):  # type: ignore[misc]  # the package has no types
    """Makes every object a `_Members`."""

    def __init__(self) -> None:
        super().__init__()
        self.parse_object = self._object
        self.scan_once, self.scan_object_once = make_scanner(self)
        self.error: tuple[hjson.HjsonDecodeError, int] | None = None
        """The first error, and the line on which the object around it opens."""

    def _object(self, state: tuple[str, int], *arguments: Any) -> tuple[_Members, int]:
        """As the package parses an object, remembering where each value starts: on the line of its key's colon."""
        encoding, strict, scan_once, _, _, *rest = arguments
        text, opening = state
        lines: list[int] = []

        def value(text: str, start: int) -> Any:
            lines.append(_line(text, text.rindex(":", 0, start)))
            return scan_once(text, start)

        def members(pairs: list[tuple[str, Any]]) -> _Members:
            return _Members((key, line, value) for (key, value), line in zip(pairs, lines, strict=True))

        try:
            parsed: tuple[_Members, int] = JSONObject(state, encoding, strict, value, None, members, *rest)
        except hjson.HjsonDecodeError as error:
            self.error = self.error or (error, _line(text, opening))
            raise
        return parsed


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _hjson(text: str, name: str) -> Any:
    decoder = _Decoder()
    try:
        return decoder.decode(text)
    except hjson.HjsonDecodeError as last:
        # Without braces the package tries an object first and then a single text, and reports about the latter.
        error, opening = decoder.error or (last, 0)
        inside = f", in the object that opens on line {opening}" if opening else ""
        at = error.pos - ("%r" in error.msg)  # where the message shows a character, the package points behind it
        rest = (text[at : at + _REST].splitlines() or [""])[0]
        end = "the end of the line" if text[at:] else "the end (is a bracket missing?)"
        message = f"{re.sub(' %r( at)?', '', error.msg)}{inside}; found {repr(rest) if rest else end}"
        raise ValueError(f"{name}:{_line(text, at)}: is not Hjson: {message}.") from error
    except IndexError as error:  # the package reads past the end
        line = _line(text, len(text))
        raise ValueError(f"{name}:{line}: is not Hjson: a comment, or a text in ''', never ends.") from error
    except (OverflowError, ValueError) as error:
        raise ValueError(f"{name}: has too large a number ({error}).") from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # the package has no types
    """Makes every mapping a `_Members`."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> _Members:
    own = [pair for pair in node.value if pair[0].tag != _MERGE]
    names = {key.value for key, _ in own}
    loader.flatten_mapping(node)  # `<<: *other` puts the other's keys before the own ones, which win
    merged = {key.value: (key, value) for key, value in node.value[: -len(own) or None] if key.value not in names}
    return _Members(
        (str(key.value), key.start_mark.line + 1, loader.construct_object(value, deep=True))
        for key, value in (*merged.values(), *own)
    )


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _yaml(text: str, name: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{name}:{line}: is not YAML: {error.problem}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{name}: is not YAML: {error}.") from error


def _document(root: Any, name: str) -> Document:
    if not isinstance(root, _Members):
        found = "a list" if isinstance(root, list) else repr(root) if root else "nothing"
        raise ValueError(f"{name}: found {found}; expected an object with settings, as in {{...}}.")
    document = Document(name, {})
    document.content.update(_plain(root, (), document=document))
    document.written.update(leaves(document.content))
    return document


def _plain(value: Any, path: Path, *, document: Document) -> Any:
    """Objects as dictionaries; the places of their keys are noted in the document."""
    if not isinstance(value, _Members):
        is_list = isinstance(value, list)
        return [_plain(item, (*path, str(n)), document=document) for n, item in enumerate(value)] if is_list else value
    content: dict[str, Any] = {}
    for key, line, inner in value:
        here = (*path, key)
        if key in content:
            first = document.places[here].rpartition(":")[2]
            raise ValueError(
                f"{document.name}:{line}: {'.'.join(here)} is there twice, first on line {first}; expected each key "
                f"once. Remove one of them."
            )
        document.places[here] = f"{document.name}:{line}"
        content[key] = _plain(inner, here, document=document)
    return content


def _exists(path: FilePath, kind: Callable[[FilePath], bool]) -> bool:
    """Whether there is a file or folder; a text that is too long for a name is none."""
    try:
        return kind(path)
    except OSError:
        return False


def _decoded(source: str) -> str | None:
    """The text that base64 stands for, with or without its last `=`; None where it stands for no settings."""
    source = "".join(source.split())
    try:
        text = base64.b64decode(source + "=" * (-len(source) % 4), altchars=b"-_").decode()
    except ValueError:
        return None
    return text if ":" in text else None


def _no_file(path: FilePath, setting: str) -> str:
    if _exists(path, FilePath.is_dir):
        return f"{setting}={path}: is a folder; expected a DeepSpeed JSON file."
    beside = path.parent.iterdir() if _exists(path.parent, FilePath.is_dir) else []
    there = [file.name for file in beside if file.suffix in (".json", *_YAML)]
    near = difflib.get_close_matches(path.name, there, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
    shown = f"{str(path)[:_SHOWN]}{'...' if len(str(path)) > _SHOWN else ''}"
    return f"{setting}={shown}: there is no such file (looked from {FilePath.cwd()}).{hint}"
