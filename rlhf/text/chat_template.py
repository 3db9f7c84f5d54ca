"""Renders conversations with a tokenizer's chat template, and finds the assistant's turns in the text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

Row = Mapping[str, Any]
Message = dict[str, Any]

ASSISTANT = "assistant"
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
NULL_CONTENT = re.compile(r"content\W*(is\s+(not\s+)?|[!=]=\s*)none\b", re.IGNORECASE)
_TURN_ENDS = WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, str]]()
"""By tokenizer and template; weak, because a tokenizer takes some 10 MB, and each stage has its own."""


class TextSpan(NamedTuple):
    """The characters of a text from `start` up to `end`."""

    start: int
    end: int


class AssistantTurns(NamedTuple):
    """The assistant's turns in a rendered conversation."""

    spans: list[TextSpan]  # turns still rendered as they were generated, with the token that ends them
    rewritten: list[int]  # numbers of the messages that are now rendered differently


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of `text` alone, without a BOS or EOS."""
    if not _calls_its_backend(type(tokenizer)):
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    backend = tokenizer.backend_tokenizer  # which that call asks in the end; half of its time goes into the way there
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return list(backend.encode(text, add_special_tokens=False).ids)


def _calls_its_backend(kind: type[PreTrainedTokenizerBase]) -> bool:
    """Whether a class of tokenizers encodes as transformers' own for the library `tokenizers` does."""
    plain = PreTrainedTokenizerFast
    return issubclass(kind, plain) and (kind.__call__, kind._encode_plus) == (plain.__call__, plain._encode_plus)


def turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The control token that the template writes after an answer; empty if it writes none."""
    known = _TURN_ENDS.setdefault(tokenizer, {})
    if template not in known:
        known[template] = _turn_end(tokenizer, template)
    return known[template]


def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    controls = {index for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    tail = encode(tokenizer, after_answer(tokenizer, template, name="the tokenizer's chat template"))
    return next((str(tokenizer.convert_ids_to_tokens(token)) for token in tail if token in controls), "")


def after_answer(tokenizer: PreTrainedTokenizerBase, template: str, *, name: str) -> str:
    """The text that `template` writes after an assistant's answer; raises ValueError if it does not render."""
    answer = "the-answer-of-a-probe"
    messages = [{"role": "user", "content": "question"}, {"role": ASSISTANT, "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except (TemplateError, TypeError) as error:
        raise ValueError(f"{name}: cannot render a question and its answer: {error}") from error
    return text.rpartition(answer)[2] if answer in text else ""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the variables that a row gives it besides messages."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    tools: list[Any] | None
    options: dict[str, Any]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, row: Row) -> ChatTemplate:
        """The template of `tokenizer` with the `tools` and `chat_template_kwargs` of a row, which may be JSON text."""
        if tokenizer.chat_template is None:
            raise ValueError(
                "the row has messages, but the tokenizer has no chat template; expected text, or model.chat_template."
            )
        tools = [_parsed(tool, dict, name="tools") for tool in _parsed(row.get("tools") or [], list, name="tools")]
        options = _parsed(row.get("chat_template_kwargs") or {}, dict, name="chat_template_kwargs")
        return cls(tokenizer, tokenizer.get_chat_template(tools=tools or None), tools or None, options)

    def render(self, messages: list[Message], *, generation_prompt: bool = False) -> str:
        """The text of a conversation; with `generation_prompt`, also what comes before the assistant's answer."""
        return str(self._render(messages, add_generation_prompt=generation_prompt)[0][0])

    def _render(self, messages: list[Message], **settings: bool) -> Any:
        shared = {**self.tokenizer.special_tokens_map, **self.options, **settings}
        if NULL_CONTENT.search(self.template):  # the template tells tool calls from answers by it
            messages = [{"content": None, **message} for message in messages]
        try:
            return render_jinja_template([messages], tools=self.tools, chat_template=self.template, **shared)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    def assistant_turns(self, messages: list[Message], text: str, *, first: int = 0) -> AssistantTurns:
        """Find the assistant's turns, from message `first` on, in `text`, which begins as `messages` are rendered.

        A template may render an answer differently once the conversation goes on: Qwen3 leaves out the reasoning of
        earlier answers. No model generates such an answer at that place, so it is listed as rewritten.
        """
        found = AssistantTurns([], [])
        for turn in range(first, len(messages)):
            if messages[turn]["role"] != ASSISTANT or (turn == 0 and not self._marks_answers):
                continue
            generated, spans = self._last_turn(messages[: turn + 1])
            if spans and text.startswith(generated[: spans[-1].end]):
                found.spans.extend(spans)
            elif spans or not self._marks_answers:
                found.rewritten.append(turn)
        return found

    @property
    def _marks_answers(self) -> bool:
        return GENERATION_BLOCK.search(self.template) is not None

    def _last_turn(self, messages: list[Message]) -> tuple[str, list[TextSpan]]:
        """The rendered conversation, and the spans of its last message, up to the token that ends the turn.

        There is no span if the message does not follow the text that generation starts from.
        """
        end_of_turn = turn_end(self.tokenizer, self.template)
        if self._marks_answers:
            (text,), (marks,) = self._render(messages, return_assistant_tokens_mask=True)
            earlier = self._render(messages[:-1], return_assistant_tokens_mask=True)[1][0] if messages[1:] else []
            # The marks of earlier turns come first.
            return text, [
                _to_end_of_turn(TextSpan(*mark), text, end_of_turn=end_of_turn) for mark in marks[len(earlier) :]
            ]
        text, prompt = self.render(messages), self.render(messages[:-1], generation_prompt=True)
        stop = text.find(end_of_turn, len(prompt)) if end_of_turn else -1
        end = stop + len(end_of_turn) if stop >= 0 else len(text)
        return text, [TextSpan(len(prompt), end)] if text.startswith(prompt) else []


def _to_end_of_turn(mark: TextSpan, text: str, *, end_of_turn: str) -> TextSpan:
    """A span that a template marked, moved to the token that ends the turn; the mark may end before or after it."""
    marked = text[mark.start : mark.end].rstrip()
    if end_of_turn and marked.endswith(end_of_turn):
        return TextSpan(mark.start, mark.start + len(marked))
    return TextSpan(mark.start, mark.end + len(end_of_turn) * text.startswith(end_of_turn, mark.end))


def _parsed(value: Any, kind: type[list[Any]] | type[dict[str, Any]], *, name: str) -> Any:
    """`value` itself if it is of the right kind, or parsed if it is the JSON of one."""
    problem = ""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            problem = f", which is not JSON ({error})"
    if not isinstance(value, kind):
        raise ValueError(f"`{name}` is {repr(value)[:80]}{problem}; expected a {kind.__name__}, or the JSON of one.")
    return value
