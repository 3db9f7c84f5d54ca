"""Data sets that are known by name, such as `rm-static`: where they are, their splits, and what their rows become.

`known_datasets.yaml` has the maps, which are those of DeepSpeed-Chat and of TRL's examples. A dialogue that is written
as one text (`Human: ... Assistant: ...`) becomes messages for a model with a chat template, so that it is asked in its
own format; for one without, it stays the text that DeepSpeed-Chat trains on.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from data.rows import BadRow, FileRows, SkippedRow
from rlhf.config.data_config import SourceConfig
from rlhf.text.chat_template import ASSISTANT, Message, Row

FIELD = re.compile(r"\{([\w.]+)(\|lines)?\}")
ROLES = {"Human": "user", "Assistant": ASSISTANT}


class _AbsentError(Exception):
    """A value that a row does not have."""


@dataclass(frozen=True)
class KnownDataset:
    """One entry of the file, which says what the keys mean."""

    name: str
    hub: str
    config: str | None = None
    also: Sequence[str] = ()
    splits: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | Sequence[str] = ()
    completion: str = ""
    chosen: str = ""
    rejected: str = ""
    answers: Sequence[str] = ()
    higher: Sequence[str] = ()
    first_if: Sequence[Any] = ()
    index: str = ""
    turns: str = ""
    replace: Mapping[str, str] = field(default_factory=dict)
    remove: Sequence[str] = ()
    after: str = ""

    def split_of(self, split: str, stage: str) -> str:
        """Its own name of a split, for `train` and `eval`; other names are its own."""
        own: str = {**self.splits, **self.splits.get(stage, {})}.get(split, split)
        return own

    @property
    def templates(self) -> dict[str, Sequence[str]]:
        """Our column -> its templates, of which the first that can be filled counts."""
        pair = ("chosen", "rejected") if self.answers else ()
        given = {name: getattr(self, name) for name in ("prompt", "completion", "chosen", "rejected")}
        listed = {name: [value] if isinstance(value, str) else [*value] for name, value in given.items() if value}
        return listed | dict.fromkeys(pair, self.answers)

    @property
    def columns(self) -> set[str]:
        """Columns of the data set that the map reads."""
        paths = [path for texts in self.templates.values() for text in texts for path, _ in FIELD.findall(text)]
        paths += [*self.higher, *self.first_if[:1], *[self.index] * bool(self.index)]
        return {path.split(".")[0] for path in paths}

    # ---- rows

    def rows(self, file: FileRows, *, stage: str, chat: bool, where: str) -> FileRows:
        """The rows of a file with our columns in place of those that the map reads.

        Args:
            file: The rows as they are.
            stage: Decides whether a tie matters: it is no preference, but its first answer can be imitated.
            chat: Turn dialogues into messages.
            where: The source, for the error.

        Raises:
            ValueError: The file has other columns.
        """
        missing = sorted(self.columns - {*file.found}) if file.found else []
        if missing:
            raise ValueError(
                f"{where} is read as {self.name}, whose rows have {sorted(self.columns)}; found columns "
                f"{[*file.found]}. Read your own columns with `columns`, or name another data set with `as`."
            )
        if not self.templates:
            return file
        found = [*self.templates, *(name for name in file.found if name not in self.columns | {*self.templates})]
        return FileRows(file.file, found, _MappedRows(file.rows, self, stage in ("reward", "dpo"), chat))

    def row(self, row: Row, *, is_preference: bool, chat: bool) -> Row | BadRow:
        """One row in our columns; those that the map does not read stay."""
        try:
            values = {
                name: self._filled(texts, row) for name, texts in self.templates.items() if not self._is_pair(name)
            }
            if self.answers:
                better = self._better(row)
                if better is None and is_preference:
                    return SkippedRow("tie: neither answer is better")
                both = [self._filled([text], row) for text in self.answers]
                values |= {"chosen": both[better or 0], "rejected": both[1 - (better or 0)]}
            values = {name: self._formed(name, value, chat=chat) for name, value in values.items()}
        except _AbsentError as absent:
            return SkippedRow(f"row without {absent}")
        except (TypeError, ValueError) as error:
            return BadRow(f"not a row of {self.name}: {error}")
        rest = {name: value for name, value in row.items() if name not in self.columns | {*self.templates}}
        return rest | values

    def _is_pair(self, name: str) -> bool:
        return bool(self.answers) and name in ("chosen", "rejected")

    def _better(self, row: Row) -> int | None:
        """The number of the better answer, None for a tie."""
        if self.higher:
            first, second = (float(_value(row, path)) for path in self.higher)
            return None if first == second else int(second > first)
        if self.first_if:
            column, value = self.first_if
            return int(_value(row, column) != value)
        return int(_value(row, self.index))

    def _filled(self, texts: Sequence[str], row: Row) -> Any:
        """The first template whose values are all there."""
        for number, text in enumerate(texts):
            try:
                if whole := FIELD.fullmatch(text):
                    return _value(row, whole[1])
                return FIELD.sub(lambda match: _lines(str(_value(row, match[1])), bool(match[2])), text)
            except _AbsentError:
                if number == len(texts) - 1:
                    raise
        raise _AbsentError("prompt")

    def _formed(self, name: str, value: Any, *, chat: bool) -> Any:
        """A text as DeepSpeed-Chat writes it, or as messages."""
        if not isinstance(value, str):
            return value
        if name == "prompt":
            for word, ours in self.replace.items():
                value = value.replace(word, ours)
        else:
            for pattern in self.remove:
                value = re.sub(pattern, "", value)
            value = value.rpartition(self.after)[2] if self.after else value
        if self.turns == "question" and not chat:
            return f" Human: {value} Assistant:" if name == "prompt" else f" {value}"
        if not self.turns or not chat:
            return value
        if self.turns == "question" or (name != "prompt" and not re.match(self.turns, value)):
            role = "user" if name == "prompt" else ASSISTANT
            return [{"role": role, "content": value.strip()}]
        return messages_of(value, self.turns)


def messages_of(text: str, pattern: str) -> list[Message]:
    r"""The turns of a dialogue that is written as one text.

    What follows an empty turn of the assistant is asked, so an empty last turn is left out; where the same one speaks
    twice, or says nothing in between, the turns are one, because chat templates want the roles to alternate.

    Args:
        text: Such as "\n\nHuman: Hi!\n\nAssistant:".
        pattern: Finds the name of who speaks, in its first group.

    Raises:
        ValueError: The text does not begin with a turn of the user.
    """
    start, *parts = re.split(pattern, text)
    turns = [(ROLES[name], said.strip()) for name, said in zip(parts[::2], parts[1::2], strict=True)]
    messages: list[Message] = []
    for role, said in ((role, said) for role, said in turns if said):
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{said}"
        else:
            messages.append({"role": role, "content": said})
    if start.strip() or not messages or messages[0]["role"] != "user":
        raise ValueError(f"expected a dialogue that begins with {next(iter(ROLES))}:, found {text[:60]!r}")
    return messages


def _value(row: Row, path: str) -> Any:
    """The value at a dotted path; a list of mappings may also be a mapping of lists, as Arrow has them."""
    value: Any = row
    for part in path.split("."):
        if isinstance(value, list):
            value = value[int(part)] if int(part) < len(value) else None
        elif isinstance(value, Mapping) and part.isdigit() and part not in value:
            value = {name: items[int(part)] for name, items in value.items() if int(part) < len(items)}
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    if value is None or value == "":
        raise _AbsentError(f"`{path}`")
    return value


def _lines(text: str, joined: bool) -> str:
    return text.replace("\n\n", "\n") if joined else text


@dataclass(frozen=True)
class _MappedRows(Sequence[Row | BadRow]):
    """Maps a row when it is asked for."""

    inner: Sequence[Row | BadRow]
    dataset: KnownDataset
    is_preference: bool
    chat: bool

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, number: Any) -> Any:
        row = self.inner[number]
        if isinstance(row, BadRow):
            return row
        return self.dataset.row(row, is_preference=self.is_preference, chat=self.chat)


# ---- names


@cache
def known_datasets() -> dict[str, KnownDataset]:
    """Every known data set, by its short name."""
    entries = yaml.safe_load(Path(__file__).with_name("known_datasets.yaml").read_text("utf-8"))
    return {name: KnownDataset(name, **entry) for name, entry in entries.items()}


def known_dataset(source: SourceConfig) -> KnownDataset | None:
    """The data set that a source names with `as`, or by a path that is a short name or ends with a hub id.

    `columns` say that the rows are read as they are.

    Raises:
        ValueError: `as` is no known name, or does not say which of several maps of a hub id is meant.
    """
    wanted = source.known_as or ("" if source.columns else source.path.rstrip("/"))
    found = named(wanted)
    if len(found) > 1 or (source.known_as and not found):
        names = [entry.name for entry in found] or [*known_datasets()]
        near = difflib.get_close_matches(wanted, names, n=1)
        hint = f" Did you mean {near[0]}?" if near and not found else ""
        raise ValueError(f"data source {source.path}: as={source.known_as}: expected one of {', '.join(names)}.{hint}")
    if found and source.known_as and source.columns:
        raise ValueError(f"data source {source.path}: found `as` and `columns`; expected one of them.")
    return found[0] if found else None


def named(name: str) -> list[KnownDataset]:
    """The data sets of a short name, or of a hub id or a path that ends with one."""
    ends = "/".join(name.lower().split("/")[-2:])
    everything = known_datasets().values()
    short = [entry for entry in everything if name in (entry.name, *entry.also)]
    return short or [entry for entry in everything if entry.hub.lower() == ends]


def own_columns(dataset: KnownDataset | None, wanted: Collection[str] | None) -> Collection[str] | None:
    """The columns of a data set to read, where `wanted` are ours; None is all."""
    return wanted if dataset is None or wanted is None else {*wanted, *dataset.columns}
