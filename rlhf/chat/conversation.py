"""The state of a chat and the slash commands that change it: plain text and numbers, no model and no terminal."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from rlhf.config.stage_configs import SamplingConfig
from rlhf.text.chat_template import Message

_HELP = """\
  /temperature T  0 takes the likeliest token
  /top_p P        draw from the likeliest tokens with this share
  /top_k K        draw from this many tokens, 0 from all
  /max N          cut answers at this many tokens
  /seed N         set the seed of the sampling, and begin its draws again
  /system TEXT    set the system message, without text remove it
  /plain on|off   on: no chat template, each line by itself
  /retry          answer the last message again, with other random numbers
  /undo           take the last message and its answer back
  /reset          forget the conversation, keep the settings
  /help           list the commands
  /quit           end the chat, as /exit and Ctrl-D do
A backslash at the end of a line continues the message on the next."""


@dataclass
class Turn:
    """A question with the answer of each model."""

    question: str
    sample: int
    """Number of the draw, the same for all models: with the seed it gives the random numbers of the answers."""
    answers: dict[str, str] = field(default_factory=dict)
    """By the label of the model; a model that could not answer, or was stopped at once, is not in it."""


class LineResult(NamedTuple):
    """What follows from a line: a notice to show, a question to answer, or the end of the chat."""

    notice: str = ""
    question: str | None = None
    ends: bool = False


@dataclass
class Conversation:
    """What the commands change: the settings of the next answer, and the turns so far."""

    sampling: SamplingConfig
    max_response_tokens: int
    seed: int
    system: str = ""
    plain: bool = False
    """Each line is a prompt of its own, without a chat template."""
    turns: list[Turn] = field(default_factory=list)
    next_sample: int = 0
    check_system: Callable[[str], None] = lambda text: None
    """Raises ValueError for a system message that a model's chat template refuses."""

    def handle_line(self, line: str) -> LineResult:
        """Run a command, or return the question; `//` begins a question with a slash."""
        if not line.strip():
            return LineResult()
        if not line.startswith("/"):
            return LineResult(question=line)
        if line.startswith("//"):
            return LineResult(question=line[1:])
        name, _, argument = line.strip().partition(" ")
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            help_text = "/help lists them; // begins a message with a slash."
            return LineResult(f"{name}: there is no such command. {hint}{help_text}")
        try:
            return COMMANDS[name](self, argument.strip())
        except ValueError as error:
            return LineResult(f"{error} Nothing was changed.")

    def begin_turn(self, question: str) -> Turn:
        """Add a turn that no model has answered yet."""
        self.turns.append(Turn(question, self.next_sample))
        self.next_sample += 1
        return self.turns[-1]

    def answered_by(self, label: str) -> list[Turn]:
        """The turns that a model remembers, oldest first."""
        return [turn for turn in self.turns if label in turn.answers]

    def take_back(self) -> str:
        """Remove the last turn that a model has answered, and return its question.

        Raises:
            ValueError: there is none.
        """
        while self.turns:
            turn = self.turns.pop()
            if turn.answers:
                return turn.question
        raise ValueError("Nothing was said yet.")

    def _sampling(self, argument: str, *, name: str, kind: type[int] | type[float]) -> LineResult:
        if argument:
            change: dict[str, Any] = {name: _number(name, argument, kind=kind)}
            self.sampling = replace(self.sampling, **change)  # checks the range
        return LineResult(f"{name} {getattr(self.sampling, name)}")

    def _max(self, argument: str) -> LineResult:
        if argument:
            value = int(_number("max", argument, kind=int))
            if value < 1:
                raise ValueError(f"/max {value}: expected 1 or more.")
            self.max_response_tokens = value
        return LineResult(f"answers are cut at {self.max_response_tokens} tokens")

    def _seed(self, argument: str) -> LineResult:
        if argument:
            self.seed, self.next_sample = int(_number("seed", argument, kind=int)), 0
        return LineResult(f"seed {self.seed}, sample {self.next_sample} comes next")

    def _system(self, argument: str) -> LineResult:
        if argument:
            self.check_system(argument)
        self.system = argument
        return LineResult("the system message is set, for the whole conversation" if argument else "no system message")

    def _plain(self, argument: str) -> LineResult:
        if argument not in ("", "on", "off"):
            raise ValueError(f"/plain {argument}: expected on or off.")
        self.plain = argument == "on" if argument else self.plain
        if self.plain:
            return LineResult("plain: each line is a prompt of its own, without a chat template")
        return LineResult("chat: the conversation goes through the chat template")

    def _reset(self, argument: str) -> LineResult:
        self.turns.clear()
        self.next_sample = 0
        return LineResult("forgotten; the next message begins a conversation")


def messages(turns: Sequence[Turn], question: str, *, label: str, system: str = "") -> list[Message]:
    """Turns of one model and the next question as a chat template reads them."""
    found = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        found.append({"role": "user", "content": turn.question})
        found.append({"role": "assistant", "content": turn.answers[label]})
    return [*found, {"role": "user", "content": question}]


def _number(name: str, argument: str, *, kind: type[int] | type[float]) -> float:
    try:
        value = kind(argument)
    except ValueError as error:
        expected = "a whole number" if kind is int else "a number"
        raise ValueError(f"/{name} {argument}: expected {expected}.") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"/{name} {argument}: expected a finite number.")
    return value


COMMANDS: dict[str, Callable[[Conversation, str], LineResult]] = {
    "/temperature": partial(Conversation._sampling, name="temperature", kind=float),
    "/top_p": partial(Conversation._sampling, name="top_p", kind=float),
    "/top_k": partial(Conversation._sampling, name="top_k", kind=int),
    "/max": Conversation._max,
    "/seed": Conversation._seed,
    "/system": Conversation._system,
    "/plain": Conversation._plain,
    "/retry": lambda conversation, _: LineResult(question=conversation.take_back()),
    "/undo": lambda conversation, _: LineResult(f"taken back: {conversation.take_back()}"),
    "/reset": Conversation._reset,
    "/help": lambda conversation, _: LineResult(_HELP),
    "/quit": lambda conversation, _: LineResult(ends=True),
    "/exit": lambda conversation, _: LineResult(ends=True),
}
