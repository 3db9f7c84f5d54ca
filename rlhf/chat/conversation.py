"""A conversation: what was said, how the next answer is drawn, and the commands that change either.

Everything here is plain text and numbers. Left out: the models (`chat_model.py`), the terminal that the lines come
from (`rlhf/chat/terminal.py`), and how messages become tokens (`rlhf/text/tokenizer.py`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rlhf.config.stage_configs import SamplingConfig
from rlhf.text.tokenizer import Message

_SLASH = "/"


class Turn(NamedTuple):
    """A question and its answer."""

    number: int
    """Of the question, the same for all who answer it."""
    question: str
    answer: str


class Fitted(NamedTuple):
    """A prompt that leaves room for an answer."""

    ids: list[int]
    forgotten: int
    """Oldest turns that are not in it."""


class Outcome(NamedTuple):
    """What follows from a line: something to say, a question to answer, or the end."""

    notice: str = ""
    question: str | None = None
    ends: bool = False


@dataclass
class Conversation:
    """The state that commands change. Each of those who answer has a history of its own, for their answers differ."""

    sampling: SamplingConfig
    max_response_tokens: int
    seed: int
    system: str = ""
    plain: bool = False
    """What is typed goes to the model as it is, each line a prompt of its own."""
    histories: list[list[Turn]] = field(default_factory=lambda: [[]])
    draws: int = 0
    """Answers drawn with this seed: the next is the sample of this number, alike for all who answer."""
    asked: int = 0
    """Number of the last question."""
    check_system: Callable[[str], None] = lambda text: None
    """Raises ValueError for a system message that somebody's chat template refuses."""

    def heed(self, line: str) -> Outcome:
        """What a line means: a command, or a question (`//` stands for a slash that begins one)."""
        if not line.strip():
            return Outcome()
        if not line.startswith(_SLASH):
            return Outcome(question=line)
        if line.startswith(2 * _SLASH):
            return Outcome(question=line[1:])
        name, _, argument = line.strip().partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            return Outcome(_unknown(name))
        try:
            return command.act(self, argument.strip())
        except ValueError as error:
            return Outcome(f"{error} Nothing was changed.")

    def ask(self) -> int:
        """Begin a turn: the number of the sample that answers it."""
        self.asked += 1
        self.draws += 1
        return self.draws - 1

    def record(self, history: list[Turn], question: str, *, answer: str) -> None:
        """Remember what somebody answered to the last question."""
        history.append(Turn(self.asked, question, answer))

    def undo(self) -> str:
        """Take the last question back, with every answer to it.

        Raises:
            ValueError: nothing was asked yet.
        """
        last = max((history[-1] for history in self.histories if history), default=None)
        if last is None:
            raise ValueError("Nothing was said yet.")
        for history in self.histories:
            if history and history[-1].number == last.number:
                history.pop()
        return last.question

    def forget(self) -> None:
        """Begin again: no turns, and the first random numbers of the seed."""
        for history in self.histories:
            history.clear()
        self.draws = 0


def messages(turns: Sequence[Turn], question: str, *, system: str = "") -> list[Message]:
    """A conversation that ends with a question, as chat templates read it."""
    said = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        said += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    return [*said, {"role": "user", "content": question}]


def fit(turns: Sequence[Turn], tokenize: Callable[[Sequence[Turn]], list[int]], *, limit: int) -> Fitted:
    """The tokens of as many of the last turns as `limit` allows; of none, they may still be more than that."""
    for forgotten in range(len(turns) + 1):
        ids = tokenize(turns[forgotten:])
        if len(ids) <= limit:
            break
    return Fitted(ids, forgotten)


class Command(NamedTuple):
    """What a line that begins with a slash does."""

    usage: str
    says: str
    act: Callable[[Conversation, str], Outcome]


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"{name}: there is no such command. {hint}/help lists them; // begins a message with a slash."


def _sampling(field_name: str, kind: Callable[[str], float]) -> Callable[[Conversation, str], Outcome]:
    """A command for one setting of the sampling, which checks its own values."""

    def act(conversation: Conversation, argument: str) -> Outcome:
        if argument:
            change: dict[str, Any] = {field_name: _number(argument, kind, name=field_name)}
            conversation.sampling = replace(conversation.sampling, **change)
        return Outcome(f"{field_name} {getattr(conversation.sampling, field_name)}")

    return act


def _number(argument: str, kind: Callable[[str], float], *, name: str) -> float:
    try:
        value = kind(argument)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"/{name} {argument}: expected {what}.") from error
    if not math.isfinite(value):
        raise ValueError(f"/{name} {argument}: expected a finite number.")
    return value


def _max(conversation: Conversation, argument: str) -> Outcome:
    if argument:
        value = int(_number(argument, int, name="max"))
        if value < 1:
            raise ValueError(f"/max {value}: expected 1 or more.")
        conversation.max_response_tokens = value
    return Outcome(f"answers are cut at {conversation.max_response_tokens} tokens")


def _seed(conversation: Conversation, argument: str) -> Outcome:
    if argument:
        conversation.seed = int(_number(argument, int, name="seed"))
        conversation.draws = 0
    return Outcome(f"seed {conversation.seed}, sample {conversation.draws} comes next")


def _system(conversation: Conversation, argument: str) -> Outcome:
    if argument:
        conversation.check_system(argument)
    removed = "no system message" if not argument else ""
    conversation.system = argument
    return Outcome(removed or "the system message is set; it stands before the whole conversation")


def _plain(conversation: Conversation, argument: str) -> Outcome:
    if argument not in ("", "on", "off"):
        raise ValueError(f"/plain {argument}: expected on or off.")
    conversation.plain = argument == "on" if argument else conversation.plain
    if conversation.plain:
        return Outcome("plain: each line is a prompt of its own, without a chat template")
    return Outcome("chat: the conversation goes through the chat template")


def _reset(conversation: Conversation, argument: str) -> Outcome:
    conversation.forget()
    return Outcome("forgotten; the next message begins a conversation")


def _undo(conversation: Conversation, argument: str) -> Outcome:
    return Outcome(f"taken back: {conversation.undo()}")


def _retry(conversation: Conversation, argument: str) -> Outcome:
    return Outcome(question=conversation.undo())


def _help(conversation: Conversation, argument: str) -> Outcome:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"  {command.usage:{width}}  {command.says}" for command in dict.fromkeys(COMMANDS.values())]
    return Outcome("\n".join([*lines, "A backslash at the end of a line continues the message on the next."]))


def _quit(conversation: Conversation, argument: str) -> Outcome:
    return Outcome(ends=True)


COMMANDS = {
    "/temperature": Command("/temperature T", "0 takes the likeliest token", _sampling("temperature", float)),
    "/top_p": Command("/top_p P", "draw from the likeliest tokens with this share", _sampling("top_p", float)),
    "/top_k": Command("/top_k K", "draw from this many tokens, 0 from all", _sampling("top_k", int)),
    "/max": Command("/max N", "cut answers at this many tokens", _max),
    "/seed": Command("/seed N", "of the sampling, from its first numbers on", _seed),
    "/system": Command("/system TEXT", "set the system message, without text remove it", _system),
    "/plain": Command("/plain on|off", "on: no chat template, each line by itself", _plain),
    "/retry": Command("/retry", "answer the last message again, with other random numbers", _retry),
    "/undo": Command("/undo", "take the last message and its answer back", _undo),
    "/reset": Command("/reset", "forget the conversation, keep the settings", _reset),
    "/help": Command("/help", "this", _help),
    "/quit": Command("/quit", "or Ctrl-D: the end", _quit),
}
COMMANDS["/exit"] = COMMANDS["/quit"]
