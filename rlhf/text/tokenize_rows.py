"""Tokenises demonstrations, preferences and prompts, and marks the tokens that are learnt.

A row has one of these forms, with strings (standard) or lists of messages (conversational):

    messages | prompt, completion | prompt, chosen, rejected | chosen, rejected | text | prompt

Only this file and `chat_template.py` know about roles. Left out: truncation (`data/` drops rows that are too long), and
content that is not text. See also: padding (`data/loader.py`).
"""

from __future__ import annotations

import itertools
import json
import operator
import re
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from rlhf.text.chat_template import ASSISTANT, AssistantTurns, ChatTemplate, Message, Row, TextSpan, encode
from rlhf.text.tokenizer import Tokenizer, stop_token_ids

TextOrMessages = str | list[Message]

HH_TURN = "\n\nAssistant:"

_ADDED = WeakKeyDictionary[Tokenizer, dict[int, str]]()
"""Texts of added tokens, slow to ask for; weak, because a tokenizer takes some 10 MB, and each stage has its own."""

_BOS = WeakKeyDictionary[Tokenizer, list[int]]()


class TokenSequence(NamedTuple):
    """One tokenised sequence."""

    input_ids: NDArray[np.int32]  # [T]
    target_mask: NDArray[np.bool_]  # [T], True where the token is learnt
    num_prompt: int  # tokens before the last response, exactly those that generation starts from
    rewritten: tuple[int, ...] = ()  # messages that are not learnt, see `AssistantTurns`


def tokenize_demonstration(tokenizer: Tokenizer, row: Row, *, response_only: bool) -> TokenSequence:
    """Tokenise a response to imitate, with the token that ends it; without `response_only` the prompt is learnt too.

    The targets are every assistant turn of `messages`, unless the template has rewritten it; or the `completion`, or
    the chosen response of a preference; or all of `text`.
    """
    prompt, response = _demonstration(row, bos=tokenizer.bos_token)
    sequence = _begin_with_prompt(tokenizer, row, prompt=prompt, learn_turns=_has(row, "messages"))
    tokens = _end_with_response(sequence, row, prompt=prompt, response=response)
    return tokens if response_only else tokens._replace(target_mask=np.arange(len(tokens.input_ids)) > 0)


def tokenize_as_generated(tokenizer: Tokenizer, row: Row, *, response_only: bool) -> list[TokenSequence]:
    """`tokenize_demonstration`, and a sequence for each turn that it could not learn, ending with that turn."""
    whole = tokenize_demonstration(tokenizer, row, response_only=response_only)
    turns = [message for part in _demonstration(row, bos=None) for message in part] if whole.rewritten else []
    shared = {name: row.get(name) for name in ("tools", "chat_template_kwargs")}
    rows = [shared | {"prompt": turns[:turn], "completion": [turns[turn]]} for turn in whole.rewritten]
    alone = [tokenize_demonstration(tokenizer, row, response_only=True) for row in rows]
    return [whole._replace(rewritten=()), *alone]


def tokenize_preference(tokenizer: Tokenizer, row: Row) -> tuple[TokenSequence, TokenSequence]:
    """Tokenise `chosen` and `rejected`, whose prompt is in `prompt`, or is what both begin with."""
    prompt, responses = _preference(row)
    chosen, rejected = (
        _end_with_response(_begin_with_prompt(tokenizer, row, prompt=prompt), row, prompt=prompt, response=response)
        for response in responses
    )
    return chosen._replace(rewritten=()), rejected._replace(rewritten=())  # earlier turns of a pair are not learnt


def tokenize_prompt(tokenizer: Tokenizer, row: Row) -> list[int]:
    """The tokens that generation starts from; if the row has a response, those before it."""
    return _begin_with_prompt(tokenizer, row, prompt=prompt_of(row)).ids


def readable_prompt(row: Row) -> str:
    """The prompt as people read it: the string, the only message, or the conversation with its roles."""
    prompt = prompt_of(row)
    if isinstance(prompt, str):
        return prompt
    lines = [f"{message['role']}: {message.get('content', '')}" for message in prompt]
    return "\n".join(lines) if len(prompt) > 1 else str(prompt[0].get("content", ""))


# ---- prompt and responses of a row


def _demonstration(row: Row, *, bos: str | None) -> tuple[Any, Any]:
    """Prompt and response; a BOS that is written in `text` is its prompt."""
    if _has(row, "messages"):
        return _last_response(_value(row, "messages"))
    if _has(row, "prompt", "completion"):
        prompt, response = _alike(_value(row, "prompt"), _value(row, "completion"))
        _require_answer(prompt, response)
        return prompt, response
    if _has(row, "chosen", "rejected"):
        prompt, responses = _preference(row)
        return prompt, responses[0]
    text = str(row["text"])
    return (bos, text.removeprefix(bos)) if bos and text.startswith(bos) else ("", text)


def _preference(row: Row) -> tuple[Any, list[Any]]:
    """The prompt, taken out of both responses, and these: chosen and rejected."""
    prompt, chosen, rejected = (_value(row, name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("of `chosen` and `rejected`, one is text and the other messages; expected the same of both.")
    carries_prompt = isinstance(chosen, list) and chosen[0]["role"] != ASSISTANT
    if prompt is None or (isinstance(prompt, str) and carries_prompt):
        prompt = _shared_start(chosen, rejected)
    alike, chosen = _alike(prompt, chosen)
    _, rejected = _alike(prompt, rejected)
    responses = [chosen, rejected]
    if all(response[: len(alike)] == alike for response in responses):  # both repeat the prompt
        responses = [response[len(alike) :] for response in responses]
    for response in responses:
        _require_answer(alike, response)
    return alike, responses


def prompt_of(row: Row) -> Any:
    """The prompt as it was given, text or messages, without the response to it."""
    if _has(row, "messages"):
        messages = _value(row, "messages")
        return _last_response(messages)[0] if messages[-1]["role"] == ASSISTANT else messages
    if _has(row, "chosen", "rejected"):
        return _preference(row)[0]
    return _alike(_value(row, "prompt"), _value(row, "completion"))[0]


def _has(row: Row, *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


def _value(row: Row, name: str) -> Any:
    """A string, or messages without the empty fields that a table gives them, or None."""
    value = row.get(name)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"`{name}` is {repr(value)[:80]}; expected text or a list of messages.")
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _alike(prompt: TextOrMessages, response: TextOrMessages | None) -> tuple[Any, Any]:
    """Both as strings or both as messages."""
    if isinstance(prompt, str) and isinstance(response, list):
        return [{"role": "user", "content": prompt}], response
    if isinstance(prompt, list) and isinstance(response, str):
        return prompt, [{"role": ASSISTANT, "content": response}]
    return prompt, response


def _last_response(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The messages before the last assistant turn, and that turn; later messages are not learnt."""
    turns = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not turns:
        raise ValueError(f"`messages` has roles {[m['role'] for m in messages]}; expected an assistant turn.")
    return messages[: turns[-1]], messages[turns[-1] : turns[-1] + 1]


def _require_answer(prompt: Any, response: Any) -> None:
    """Raise ValueError unless a response of messages begins with an assistant's."""
    if isinstance(response, list) and [message["role"] for message in response[:1]] != [ASSISTANT]:
        asked, answered = ([message["role"] for message in part] for part in (prompt, response))
        raise ValueError(
            f"the response has roles {answered} after a prompt with roles {asked}; expected the answer alone, or "
            "before it the same messages as in the prompt, a system message too."
        )


def _shared_start(chosen: Any, rejected: Any) -> TextOrMessages:
    """The prompt inside two responses: the messages, or the text, that both begin with.

    Text is cut before its last space, as in TRL's `extract_prompt` but never inside a word; in the dialogues of
    Anthropic's HH data, after the last `Assistant:`, even if both answers begin with the same words.
    """
    same = itertools.takewhile(operator.truth, map(operator.eq, chosen, rejected))
    shared: TextOrMessages = chosen[: len(list(same))]
    if isinstance(shared, str):
        spaces = [match.start() for match in re.finditer(r"\s", shared)]
        if HH_TURN in shared:
            shared = shared[: shared.rindex(HH_TURN) + len(HH_TURN)]
        elif spaces:
            shared = shared[: spaces[-1] + (shared[spaces[-1]] != " ")]
    if not shared:
        raise ValueError("`chosen` and `rejected` begin differently; expected a shared prompt, or a column `prompt`.")
    return shared


# ---- from prompt and response to tokens


@dataclass
class _GrowingSequence:
    """Tokens of a text that grows piece by piece, so that the tokens of its start never change."""

    tokenizer: Tokenizer
    bos: list[int] = field(default_factory=list)
    rewritten: list[int] = field(default_factory=list)  # messages that should be learnt and cannot
    text: str = ""
    ids: list[int] = field(init=False)
    learnt: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.ids, self.learnt = [*self.bos], [False] * len(self.bos)

    def add(self, piece: str, *, learn: bool) -> None:
        """Append `piece` tokenised as part of the whole or, if that would change earlier tokens, on its own."""
        whole = [*self.bos, *encode(self.tokenizer, self.text + piece)]
        known = len(self.ids)
        new = whole[known:] if whole[:known] == self.ids else encode(self.tokenizer, piece)
        self.text += piece
        self.ids += new
        self.learnt += [learn] * len(new)

    def add_spans(self, text: str, spans: Sequence[TextSpan], *, learn: bool) -> None:
        """Append the rest of `text`, cut at the edges of `spans`; `learn` makes targets of the tokens inside them."""
        position = len(self.text)
        cuts = sorted({position, len(text), *(edge for span in spans for edge in span if edge > position)})
        for start, end in itertools.pairwise(cuts):
            inside = any(span.start <= start and end <= span.end for span in spans)
            self.add(text[start:end], learn=learn and inside)


def _bos(tokenizer: Tokenizer) -> list[int]:
    """The BOS, where the tokenizer begins a text with it."""
    if tokenizer not in _BOS:
        _BOS[tokenizer] = [id for id in tokenizer("", verbose=False).input_ids[:1] if id == tokenizer.bos_token_id]
    return _BOS[tokenizer]


def _begin_with_prompt(
    tokenizer: Tokenizer, row: Row, *, prompt: TextOrMessages, learn_turns: bool = False
) -> _GrowingSequence:
    """The sequence before the response; `learn_turns` makes targets of earlier assistant turns."""
    if isinstance(prompt, str):
        sequence = _GrowingSequence(
            tokenizer, [] if prompt.startswith(tokenizer.bos_token or "\0") else _bos(tokenizer)
        )
        sequence.add(prompt, learn=False)
        return sequence
    if not prompt or prompt[-1]["role"] == ASSISTANT:
        roles = [message["role"] for message in prompt]
        raise ValueError(f"the prompt has roles {roles}; expected its last turn to be one that an assistant answers.")
    template = ChatTemplate.of(tokenizer, row)
    text = template.render(prompt, generation_prompt=True)
    turns = AssistantTurns([], [])
    with nullcontext() if learn_turns else suppress(ValueError):  # turns that are not learnt only say where to cut
        turns = template.assistant_turns(prompt, text)
    if learn_turns:
        _require_no_end(prompt, tokenizer)
    sequence = _GrowingSequence(tokenizer, rewritten=turns.rewritten if learn_turns else [])
    sequence.add_spans(text, turns.spans, learn=learn_turns)
    return sequence


def _end_with_response(sequence: _GrowingSequence, row: Row, *, prompt: Any, response: Any) -> TokenSequence:
    """Append the response and the token that ends it."""
    num_prompt, tokenizer = len(sequence.ids), sequence.tokenizer
    if isinstance(prompt, str) and isinstance(response, str):
        _add_text(sequence, response, is_all=prompt in ("", tokenizer.bos_token))
    else:
        _add_messages(sequence, row, prompt=prompt, response=response)
    if len(sequence.ids) == num_prompt:
        raise ValueError("the response is empty; expected text, or an assistant turn that the chat template renders.")
    if sequence.ids[-1] not in stop_token_ids(tokenizer):
        sequence.ids.append(tokenizer.eos_token_id)
        sequence.learnt.append(True)
    target_mask = np.array(sequence.learnt)
    target_mask[0] = False  # nothing comes before it that could predict it
    return TokenSequence(np.array(sequence.ids, dtype=np.int32), target_mask, num_prompt, tuple(sequence.rewritten))


def _add_text(sequence: _GrowingSequence, text: str, *, is_all: bool) -> None:
    """Append a response. If it is all of a row, it may hold several answers or documents, each with its end."""
    stripped = text.rstrip()
    end = next((end for end in _stop_texts(sequence.tokenizer) if stripped.endswith(end)), "")
    if not is_all:
        _require_no_end(stripped.removesuffix(end), sequence.tokenizer)
    sequence.add(stripped if end else text, learn=True)  # no second end after the white space behind an end


def _add_messages(sequence: _GrowingSequence, row: Row, *, prompt: list[Message], response: list[Message]) -> None:
    """Append the messages of a response, up to the end of the last assistant turn."""
    _require_no_end(response, sequence.tokenizer)
    template, messages = ChatTemplate.of(sequence.tokenizer, row), [*prompt, *response]
    text = template.render(messages)
    turns = template.assistant_turns(messages, text, first=len(prompt))
    if not text.startswith(sequence.text) or (turns.rewritten and not turns.spans):
        raise ValueError(
            "the chat template renders the beginning of this conversation differently once it goes on, so an answer "
            "would not follow what generation sees; expected a template that only appends, or one that marks answers "
            "with {% generation %} (model.chat_template)."
        )
    sequence.rewritten += turns.rewritten
    sequence.add_spans(text[: turns.spans[-1].end if turns.spans else 0], turns.spans, learn=True)


def _stop_texts(tokenizer: Tokenizer) -> list[str]:
    """The texts that are encoded to stop tokens."""
    known = _added_tokens(tokenizer)
    return [known[token] for token in stop_token_ids(tokenizer) if token in known]


def _added_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    if tokenizer not in _ADDED:
        _ADDED[tokenizer] = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    return _ADDED[tokenizer]


def _require_no_end(answer: TextOrMessages, tokenizer: Tokenizer) -> None:
    """Raise ValueError if an answer, or an assistant's message, holds the text of a token that would end it."""
    # All of a message, because tool calls may hold such a text too.
    texts = (
        [answer]
        if isinstance(answer, str)
        else [json.dumps(m, ensure_ascii=False, default=str) for m in answer if m["role"] == ASSISTANT]
    )
    found = [end for text in texts for end in _stop_texts(tokenizer) if end in text]
    if found:
        raise ValueError(
            f"an answer holds the text {found[0]!r}, which becomes the token that ends answers, so that it would end "
            "there; expected another way to write it, or none."
        )
