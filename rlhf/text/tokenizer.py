"""Between text and tokens: the tokenizer, prompts and targets. With `rlhf/text/chat_template.py`, all that knows roles.

A row has one of these forms, with strings (standard) or lists of messages (conversational):

    messages | prompt, completion | prompt, chosen, rejected | chosen, rejected | text | prompt

Left out: the pad token (`pad_token.py`), padding (`data/collate.py`), truncation (too long rows are dropped in
`data/`), and content that is not text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from rlhf.runtime.pretrained import load_auto
from rlhf.text.chat_template import ASSISTANT, Chat, Span, Turns, after_answer, encode, turn_end
from rlhf.text.chat_template import Message as Message
from rlhf.text.chat_template import Row as Row
from rlhf.text.chat_template import Tokenizer as Tokenizer
from rlhf.text.pad_token import set_pad_token

Part = str | list[Message]

HH_TURN = "\n\nAssistant:"


class Tokens(NamedTuple):
    """One tokenised sequence."""

    input_ids: NDArray[np.int32]  # [T]
    target_mask: NDArray[np.bool_]  # [T], True where the token is learnt
    num_prompt: int  # tokens before the last response, exactly those that generation starts from
    rewritten: tuple[int, ...] = ()  # messages that are not learnt, see `Turns`


class TokenPair(NamedTuple):
    """One tokenised preference."""

    chosen: Tokens
    rejected: Tokens


class Pair(NamedTuple):
    """A preference, its prompt taken out of both responses."""

    prompt: Part
    chosen: Part
    rejected: Part


def load_tokenizer(path: str, *, chat_template: str | None = None, pad_token: str | None = None) -> Tokenizer:
    """The tokenizer at `path`, certain to have an EOS and a pad token, with the vocabulary size it came with.

    Args:
        path: Folder or hub id (`model.path`).
        chat_template: Jinja file that replaces the tokenizer's own template (`model.chat_template`).
        pad_token: Token to pad with (`model.pad_token`); None looks for one. See [Note: padding].
    """
    folder = str(Path(path).expanduser()) if str(path).startswith("~") else path
    complaint = f"{path}: found no tokenizer there that loads:"
    tokenizer: Tokenizer = load_auto(AutoTokenizer, folder, complaint=complaint)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no EOS token; name one as `eos_token` in its config.")
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise ValueError(f"model.chat_template={chat_template}: no such file; expected a Jinja chat template.")
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        after_answer(tokenizer, tokenizer.chat_template, name=f"model.chat_template={chat_template}")
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
        end_of_turn = turn_end(tokenizer, tokenizer.get_chat_template())
        ids.append(tokenizer.convert_tokens_to_ids(end_of_turn) if end_of_turn else None)
    return tuple(dict.fromkeys(token for token in ids if token is not None))


@lru_cache(maxsize=16)
def _written(tokenizer: Tokenizer, stops: tuple[int, ...]) -> tuple[str, ...]:
    """What the stop tokens look like in a text that is encoded to them."""
    known = tokenizer.added_tokens_decoder
    return tuple(known[token].content for token in stops if token in known)


def tokenize_demonstration(tokenizer: Tokenizer, row: Row, *, response_only: bool) -> Tokens:
    """Tokenise a response to imitate, with the token that ends it.

    Args:
        tokenizer: From `load_tokenizer`.
        row: `messages` (every assistant turn is a target, unless the template has rewritten it), or `prompt` and
            `completion`, or a preference (its chosen response), or `text` (all of it).
        response_only: False makes targets of the prompts too.
    """
    prompt, response = _demonstration(row, bos=tokenizer.bos_token)
    sequence = _start(tokenizer, row, prompt=prompt, learn_turns=_has(row, "messages"))
    tokens = _respond(sequence, row, prompt=prompt, response=response)
    return tokens if response_only else tokens._replace(target_mask=np.arange(len(tokens.input_ids)) > 0)


def tokenize_as_generated(tokenizer: Tokenizer, row: Row, *, response_only: bool) -> list[Tokens]:
    """`tokenize_demonstration`, and a sequence for each turn that it could not learn, ending with that turn."""
    whole = tokenize_demonstration(tokenizer, row, response_only=response_only)
    turns = [message for part in _demonstration(row, bos=None) for message in part] if whole.rewritten else []
    shared = {name: row.get(name) for name in ("tools", "chat_template_kwargs")}
    rows = [shared | {"prompt": turns[:turn], "completion": [turns[turn]]} for turn in whole.rewritten]
    alone = [tokenize_demonstration(tokenizer, row, response_only=True) for row in rows]
    return [whole._replace(rewritten=()), *alone]


def _demonstration(row: Row, *, bos: str | None) -> tuple[Part, Part]:
    """Prompt and response; a BOS that is written in `text` is its prompt."""
    if _has(row, "messages"):
        return _last_response(_part(row, "messages"))
    if _has(row, "prompt", "completion"):
        prompt, response = _alike(_part(row, "prompt"), _part(row, "completion"))
        _require_answer(prompt, response)
        return prompt, response
    if _has(row, "chosen", "rejected"):
        return _pair(row)[:2]
    text = str(row["text"])
    return (bos, text.removeprefix(bos)) if bos and text.startswith(bos) else ("", text)


def tokenize_preference(tokenizer: Tokenizer, row: Row) -> TokenPair:
    """Tokenise `chosen` and `rejected`, whose prompt is in `prompt`, or is what both begin with."""
    prompt, *responses = _pair(row)
    starts = [_start(tokenizer, row, prompt=prompt) for _ in responses]
    pair = [
        _respond(start, row, prompt=prompt, response=response)._replace(rewritten=())  # a pair teaches no turns
        for start, response in zip(starts, responses, strict=True)
    ]
    return TokenPair(*pair)


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
    for response in (chosen[cut:], rejected[cut:]):
        _require_answer(alike, response)
    return Pair(alike, chosen[cut:], rejected[cut:])


def _require_answer(prompt: Any, response: Any) -> None:
    """Raise ValueError unless an assistant begins the response, where that is messages."""
    if isinstance(response, list) and [message["role"] for message in response[:1]] != [ASSISTANT]:
        asked, answered = ([message["role"] for message in part] for part in (prompt, response))
        raise ValueError(
            f"the response has roles {answered} after a prompt with roles {asked}; expected the answer alone, or "
            "before it the same messages as in the prompt, a system message too."
        )


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
    rewritten: list[int] = field(default_factory=list)  # messages that should be learnt and cannot

    def add(self, piece: str, *, learn: bool) -> None:
        """Append `piece` tokenised as part of the whole or, where that would change earlier tokens, on its own."""
        whole = [*self.bos, *encode(self.tokenizer, self.text + piece)]
        known = len(self.ids)
        new = whole[known:] if whole[:known] == self.ids else encode(self.tokenizer, piece)
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
    chat = Chat.of(tokenizer, row)
    text = chat.render(prompt, generation_prompt=True)
    turns = Turns([], [])
    with nullcontext() if learn_turns else suppress(ValueError):  # what nobody learns only says where to cut
        turns = chat.turns(prompt, text)
    if learn_turns:
        _require_no_ends(prompt, tokenizer)
    sequence = _Sequence(tokenizer, rewritten=turns.rewritten if learn_turns else [])
    sequence.add_spans(text, turns.spans, learn=learn_turns)
    return sequence


def _respond(sequence: _Sequence, row: Row, *, prompt: Part, response: Part) -> Tokens:
    """Append the response and the token that ends it."""
    num_prompt, stops = len(sequence.ids), stop_token_ids(sequence.tokenizer)
    if isinstance(prompt, str) and isinstance(response, str):
        _add_text(sequence, response, is_all=prompt in ("", sequence.tokenizer.bos_token))
    else:
        _add_turns(sequence, row, prompt=prompt, response=response)
    if len(sequence.ids) == num_prompt:
        raise ValueError("the response is empty; expected text, or an assistant turn that the chat template renders.")
    if sequence.ids[-1] not in stops:
        sequence.ids.append(sequence.tokenizer.eos_token_id)
        sequence.learnt.append(True)
    target_mask = np.array(sequence.learnt)
    target_mask[0] = False  # nothing comes before it that could predict it
    return Tokens(np.array(sequence.ids, dtype=np.int32), target_mask, num_prompt, tuple(sequence.rewritten))


def _add_text(sequence: _Sequence, text: str, *, is_all: bool) -> None:
    """Append a response; one that is all of a row may hold several answers or documents, with their ends."""
    stripped = text.rstrip()
    end = next(
        (end for end in _written(sequence.tokenizer, stop_token_ids(sequence.tokenizer)) if stripped.endswith(end)), ""
    )
    if not is_all:
        _require_no_end(stripped.removesuffix(end), sequence.tokenizer)
    sequence.add(stripped if end else text, learn=True)  # no second end after the white space behind an end


def _add_turns(sequence: _Sequence, row: Row, *, prompt: Any, response: Any) -> None:
    """Append the messages of a response, up to the end of the last one that an assistant says."""
    _require_no_ends(response, sequence.tokenizer)
    chat = Chat.of(sequence.tokenizer, row)
    text = chat.render([*prompt, *response])
    turns = chat.turns([*prompt, *response], text, first=len(prompt))
    if not text.startswith(sequence.text) or (turns.rewritten and not turns.spans):
        raise ValueError(
            "the chat template renders the beginning of this conversation differently once it goes on, so an answer "
            "would not follow what generation sees; expected a template that only appends, or one that marks answers "
            "with {% generation %} (model.chat_template)."
        )
    sequence.rewritten += turns.rewritten
    sequence.add_spans(text[: turns.spans[-1].end if turns.spans else 0], turns.spans, learn=True)


def _require_no_end(text: str, tokenizer: Tokenizer) -> None:
    """Raise ValueError where an answer holds the text of a token that would end it."""
    found = [end for end in _written(tokenizer, stop_token_ids(tokenizer)) if end in text]
    if found:
        raise ValueError(
            f"an answer holds the text {found[0]!r}, which becomes the token that ends answers, so that it would end "
            "there; expected another way to write it, or none."
        )


def _require_no_ends(messages: list[Message], tokenizer: Tokenizer) -> None:
    for message in messages:
        said = json.dumps(message, ensure_ascii=False, default=str) if message["role"] == ASSISTANT else ""
        _require_no_end(said, tokenizer)
