"""Between text and tokens: the tokenizer, its chat template, prompts and targets. The only module that knows roles.

A row has one of these forms, with strings (standard) or lists of messages (conversational):

    messages | prompt, completion | prompt, chosen, rejected | chosen, rejected | text | prompt

Left out: the pad token (`rlhf/text_pad.py`), padding (`data/collate.py`), truncation (too long rows are dropped in
`data/`), and content that is not text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf.text_pad import set_pad_token

Tokenizer = PreTrainedTokenizerBase
Row = Mapping[str, Any]
Message = dict[str, Any]
Part = str | list[Message]

ASSISTANT = "assistant"
HH_TURN = "\n\nAssistant:"
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Tokens(NamedTuple):
    """One tokenised sequence."""

    input_ids: NDArray[np.int32]  # [T]
    target_mask: NDArray[np.bool_]  # [T], True where the token is learnt
    num_prompt: int  # tokens before the last response, exactly those that generation starts from


class TokenPair(NamedTuple):
    """One tokenised preference."""

    chosen: Tokens
    rejected: Tokens


class Pair(NamedTuple):
    """A preference, its prompt taken out of both responses."""

    prompt: Part
    chosen: Part
    rejected: Part


class Span(NamedTuple):
    """The characters of a text from `start` up to `end`."""

    start: int
    end: int


def load_tokenizer(path: str, *, chat_template: str | None = None, pad_token: str | None = None) -> Tokenizer:
    """The tokenizer at `path`, certain to have an EOS and a pad token, with the vocabulary size it came with.

    Args:
        path: Folder or hub id (`model.path`).
        chat_template: Jinja file that replaces the tokenizer's own template (`model.chat_template`).
        pad_token: Token to pad with (`model.pad_token`); None looks for one. See [Note: padding].
    """
    try:
        folder = str(Path(path).expanduser()) if str(path).startswith("~") else path
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path={path}: found no tokenizer there that loads. {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path={path}: the tokenizer has no EOS token; name one as `eos_token` in its config.")
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise ValueError(f"model.chat_template={chat_template}: no such file; expected a Jinja chat template.")
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        _after_answer(tokenizer, tokenizer.chat_template, name=f"model.chat_template={chat_template}")
    set_pad_token(tokenizer, pad_token, taken={tokenizer.bos_token_id, *stop_token_ids(tokenizer)}, path=path)
    return tokenizer


def template_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of chat template, special token ids and vocabulary size: what two stages must agree on."""
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    facts = json.dumps([tokenizer.chat_template, ids, len(tokenizer)], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of all that decides how a row is tokenised: `template_fingerprint` and the whole vocabulary."""
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    vocabulary = tokenizer.backend_tokenizer.to_str() if fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256((template_fingerprint(tokenizer) + vocabulary).encode()).hexdigest()


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of `ids`, special tokens removed and spaces left alone."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def stop_token_ids(tokenizer: Tokenizer, generation_config: GenerationConfig | None = None) -> tuple[int, ...]:
    """Tokens that end a response: the EOS, the model's own list, and the end of a turn in the chat template."""
    listed = generation_config.eos_token_id if generation_config is not None else None
    ids = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    if tokenizer.chat_template is not None:
        turn_end = _turn_end(tokenizer, tokenizer.get_chat_template())
        ids.append(tokenizer.convert_tokens_to_ids(turn_end) if turn_end else None)
    return tuple(dict.fromkeys(token for token in ids if token is not None))


@lru_cache(maxsize=16)
def _turn_end(tokenizer: Tokenizer, template: str) -> str:
    """The control token that the template writes after an answer; empty where it writes none."""
    controls = {index for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    tail = _encode(tokenizer, _after_answer(tokenizer, template, name="the tokenizer's chat template"))
    return next((str(tokenizer.convert_ids_to_tokens(token)) for token in tail if token in controls), "")


def _after_answer(tokenizer: Tokenizer, template: str, *, name: str) -> str:
    """What `template` writes after an assistant's answer; raises ValueError where it does not render."""
    answer = "the-answer-of-a-probe"
    messages = [{"role": "user", "content": "question"}, {"role": ASSISTANT, "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except (TemplateError, TypeError) as error:
        raise ValueError(f"{name}: cannot render a question and its answer: {error}") from error
    return text.rpartition(answer)[2] if answer in text else ""


def tokenize_demonstration(tokenizer: Tokenizer, row: Row, *, response_only: bool) -> Tokens:
    """Tokenise a response to imitate, with the token that ends it.

    Args:
        tokenizer: From `load_tokenizer`.
        row: `messages` (every assistant turn is a target), or `prompt` and `completion`, or a preference (its chosen
            response), or `text` (all of it).
        response_only: False makes targets of the prompts too.
    """
    prompt: Part
    response: Part
    if _has(row, "messages"):
        prompt, response = _last_response(_part(row, "messages"))
    elif _has(row, "prompt", "completion"):
        prompt, response = _alike(_part(row, "prompt"), _part(row, "completion"))
    elif _has(row, "chosen", "rejected"):
        prompt, response, _ = _pair(row)
    else:
        prompt, response = "", _part(row, "text")
    sequence = _start(tokenizer, row, prompt=prompt, learn_turns=_has(row, "messages"))
    tokens = _respond(sequence, row, prompt=prompt, response=response)
    return tokens if response_only else tokens._replace(target_mask=np.arange(len(tokens.input_ids)) > 0)


def tokenize_preference(tokenizer: Tokenizer, row: Row) -> TokenPair:
    """Tokenise `chosen` and `rejected`, whose prompt is in `prompt`, or is what both begin with."""
    prompt, chosen, rejected = _pair(row)
    responses = (chosen, rejected)
    return TokenPair(
        *(
            _respond(_start(tokenizer, row, prompt=prompt), row, prompt=prompt, response=response)
            for response in responses
        )
    )


def tokenize_prompt(tokenizer: Tokenizer, row: Row) -> list[int]:
    """The tokens that generation starts from; of a row that has a response, those before it."""
    return _start(tokenizer, row, prompt=_prompt(row)).ids


def readable_prompt(row: Row) -> str:
    """The prompt as people read it: the string, the only message, or the conversation with its roles."""
    prompt = _prompt(row)
    if isinstance(prompt, str):
        return prompt
    lines = [f"{message['role']}: {message.get('content', '')}" for message in prompt]
    return "\n".join(lines) if len(prompt) > 1 else str(prompt[0]["content"])


def _prompt(row: Row) -> Part:
    if _has(row, "messages"):
        messages: list[Message] = _part(row, "messages")
        return _last_response(messages)[0] if messages[-1]["role"] == ASSISTANT else messages
    if _has(row, "chosen", "rejected"):
        return _pair(row).prompt
    prompt: Part = _alike(_part(row, "prompt"), _part(row, "completion"))[0]
    return prompt


def _has(row: Row, *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


def _part(row: Row, name: str) -> Any:
    """A string, or messages without the empty fields that a table gives them, or None."""
    value = row.get(name)
    if value is None or isinstance(value, str):
        return value
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _alike(prompt: Part, response: Part | None) -> tuple[Any, Any]:
    """Both as strings or both as messages."""
    if isinstance(prompt, str) and isinstance(response, list):
        return [{"role": "user", "content": prompt}], response
    if isinstance(prompt, list) and isinstance(response, str):
        return prompt, [{"role": ASSISTANT, "content": response}]
    return prompt, response


def _last_response(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """What comes before the last assistant turn, and that turn; what follows it is nobody's target."""
    turns = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not turns:
        raise ValueError(f"`messages` has roles {[m['role'] for m in messages]}; expected an assistant turn.")
    return messages[: turns[-1]], messages[turns[-1] : turns[-1] + 1]


def _pair(row: Row) -> Pair:
    prompt, chosen, rejected = (_part(row, name) for name in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("of `chosen` and `rejected`, one is text and the other messages; expected the same of both.")
    carries_prompt = isinstance(chosen, list) and chosen[0]["role"] != ASSISTANT
    if prompt is None or (isinstance(prompt, str) and carries_prompt):
        prompt = _shared_start(chosen, rejected)
    alike, chosen = _alike(prompt, chosen)
    _, rejected = _alike(prompt, rejected)
    repeated = all(response[: len(alike)] == alike for response in (chosen, rejected))
    cut = len(alike) if repeated else 0
    return Pair(alike, chosen[cut:], rejected[cut:])


def _shared_start(chosen: Any, rejected: Any) -> Part:
    """The prompt inside two responses: the messages, or the text, that both begin with.

    Text is cut before its last space, as in TRL's `extract_prompt` but never inside a word; and in the dialogues of
    Anthropic's HH data after the last `Assistant:`, even where both answers begin with the same words.
    """
    same = itertools.takewhile(operator.truth, map(operator.eq, chosen, rejected))
    shared: Part = chosen[: len(list(same))]
    if isinstance(shared, str):
        spaces = [match.start() for match in re.finditer(r"\s", shared)]
        if HH_TURN in shared:
            shared = shared[: shared.rindex(HH_TURN) + len(HH_TURN)]
        elif spaces:
            shared = shared[: spaces[-1] + (shared[spaces[-1]] != " ")]
    if not shared:
        raise ValueError("`chosen` and `rejected` begin differently; expected a shared prompt, or a column `prompt`.")
    return shared


@dataclass
class _Sequence:
    """Tokens of a text that grows piece by piece, so that those of its start never change."""

    tokenizer: Tokenizer
    bos: list[int] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    learnt: list[bool] = field(default_factory=list)

    def add(self, piece: str, *, learn: bool) -> None:
        """Append `piece` tokenised as part of the whole or, where that would change earlier tokens, on its own."""
        whole = [*self.bos, *_encode(self.tokenizer, self.text + piece)]
        known = len(self.ids)
        new = whole[known:] if whole[:known] == self.ids else _encode(self.tokenizer, piece)
        self.text += piece
        self.ids += new
        self.learnt += [learn] * len(new)

    def add_spans(self, text: str, spans: Sequence[Span], *, learn: bool) -> None:
        """Append the rest of `text`, cut where a span begins or ends; `learn` makes targets of what is inside."""
        position = len(self.text)
        cuts = sorted({position, len(text), *(edge for span in spans for edge in span if edge > position)})
        for start, end in zip(cuts, cuts[1:], strict=False):
            inside = any(span.start <= start and end <= span.end for span in spans)
            self.add(text[start:end], learn=learn and inside)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _start(tokenizer: Tokenizer, row: Row, *, prompt: Part, learn_turns: bool = False) -> _Sequence:
    """The sequence up to where the response begins; `learn_turns` makes targets of earlier assistant turns."""
    if isinstance(prompt, str):
        bos = [] if prompt.startswith(tokenizer.bos_token or "\0") else tokenizer("", verbose=False).input_ids[:1]
        bos = [token for token in bos if token == tokenizer.bos_token_id]
        sequence = _Sequence(tokenizer, bos=bos, ids=[*bos], learnt=[False] * len(bos))
        sequence.add(prompt, learn=False)
        return sequence
    if not prompt or prompt[-1]["role"] == ASSISTANT:
        roles = [message["role"] for message in prompt]
        raise ValueError(f"the prompt has roles {roles}; expected its last turn to be one that an assistant answers.")
    chat = _Chat.of(tokenizer, row)
    sequence = _Sequence(tokenizer)
    text = chat.render(prompt, generation_prompt=True)
    spans: list[Span] = []
    with nullcontext() if learn_turns else suppress(ValueError):  # turns that nobody learns may be rewritten later
        spans = chat.spans(prompt, text)
    sequence.add_spans(text, spans, learn=learn_turns)
    return sequence


def _respond(sequence: _Sequence, row: Row, *, prompt: Part, response: Part) -> Tokens:
    """Append the response and the token that ends it."""
    num_prompt = len(sequence.ids)
    if isinstance(response, str):
        sequence.add(response, learn=True)
    else:
        chat = _Chat.of(sequence.tokenizer, row)
        text = chat.render([*prompt, *response])
        spans = chat.spans([*prompt, *response], text, first=len(prompt))
        chat.require_start(sequence.text, text)
        sequence.add_spans(text[: spans[-1].end if spans else 0], spans, learn=True)
    if len(sequence.ids) == num_prompt:
        raise ValueError("the response is empty; expected text, or an assistant turn that the chat template renders.")
    if sequence.ids[-1] not in stop_token_ids(sequence.tokenizer):
        sequence.ids.append(sequence.tokenizer.eos_token_id)
        sequence.learnt.append(True)
    target_mask = np.array(sequence.learnt)
    target_mask[0] = False  # nothing comes before it that could predict it
    return Tokens(np.array(sequence.ids, dtype=np.int32), target_mask, num_prompt)


@dataclass(frozen=True)
class _Chat:
    """A chat template, and what a row gives it besides messages."""

    tokenizer: Tokenizer
    template: str
    tools: list[Any] | None
    options: dict[str, Any]

    @classmethod
    def of(cls, tokenizer: Tokenizer, row: Row) -> _Chat:
        if tokenizer.chat_template is None:
            raise ValueError(
                "the row has messages, but the tokenizer has no chat template; expected text, or model.chat_template."
            )
        tools = row.get("tools") or None
        return cls(tokenizer, tokenizer.get_chat_template(tools=tools), tools, row.get("chat_template_kwargs") or {})

    def render(self, messages: list[Message], *, generation_prompt: bool = False) -> str:
        return str(self._render(messages, add_generation_prompt=generation_prompt)[0][0])

    def _render(self, messages: list[Message], **settings: bool) -> Any:
        shared = {**self.tokenizer.special_tokens_map, **self.options, **settings}
        try:
            return render_jinja_template([messages], tools=self.tools, chat_template=self.template, **shared)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    def spans(self, messages: list[Message], text: str, *, first: int = 0) -> list[Span]:
        """Where the assistant speaks in `text`, from message `first` on, the end of each turn included."""
        end_of_turn = _turn_end(self.tokenizer, self.template)
        if GENERATION_BLOCK.search(self.template):
            marked = self._render(messages, return_assistant_tokens_mask=True)[1][0]
            return [Span(start, end + len(end_of_turn) * text.startswith(end_of_turn, end)) for start, end in marked]
        turns = [turn for turn in range(max(first, 1), len(messages)) if messages[turn]["role"] == ASSISTANT]
        prompts = [self.render(messages[:turn], generation_prompt=True) for turn in turns]
        for prompt in prompts:
            self.require_start(prompt, text)
        limits = [*map(len, prompts[1:]), len(text)]
        parts = zip(prompts, limits, turns, strict=False)  # without turns there is one limit too many
        return [self._turn(prompt, text[:limit], messages=messages[: turn + 1]) for prompt, limit, turn in parts]

    def _turn(self, prompt: str, text: str, *, messages: list[Message]) -> Span:
        """The turn that begins in `text` after `prompt`: up to the token that ends it, or all of it."""
        end_of_turn = _turn_end(self.tokenizer, self.template)
        stop = text.find(end_of_turn, len(prompt)) if end_of_turn else -1
        if stop >= 0:
            return Span(len(prompt), stop + len(end_of_turn))
        rendered = self.render(messages)
        self.require_start(rendered, text)
        return Span(len(prompt), len(rendered))

    def require_start(self, start: str, text: str) -> None:
        """Raise ValueError where a part of a conversation renders differently from the same part of the whole."""
        if not text.startswith(start):
            raise ValueError(
                "the chat template renders the beginning of this conversation differently once it goes on, so an "
                "answer would not follow what generation sees; expected a template that only appends, or one that "
                "marks answers with {% generation %} (model.chat_template)."
            )
