"""Between text and tokens: the tokenizer, its chat template, prompts and targets. The only module that knows roles.

A row has one of these forms, with strings (standard) or lists of messages (conversational):

    messages | prompt, completion | prompt, chosen, rejected | chosen, rejected | text | prompt

[Note: padding] The pad token must differ from the EOS. Inside the project it would not matter, because every mask
comes from lengths; but an exported `AutoModelForSequenceClassification` reads its score at the last token that is
not padding, and would skip an EOS that looks like it. The vocabulary never grows, so no model is resized.

Left out: truncation (rows that are too long are dropped in `data/`), padding (`data/collate.py`), images.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers.models import BPE
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
Message = dict[str, Any]
Part = str | list[Message]

ASSISTANT = "assistant"
HH_TURN = "\n\nAssistant:"
PAD_LIKE = (
    *("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|fim_pad|>", "<|vision_pad|>"),
    *("<|extra_0|>", "<|reserved_special_token_0|>", "<|endoftext|>"),
)
BYTES_NEVER_IN_UTF8 = (*range(0xFF, 0xF4, -1), 0xC1, 0xC0)
NEW_PAD = "<|pad|>"
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Tokens(NamedTuple):
    """One tokenised sequence."""

    input_ids: NDArray[np.int32]  # [T]
    target_mask: NDArray[np.bool_]  # [T], True where the token is learnt
    num_prompt: int  # tokens before the (last) response: exactly those that generation starts from


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
    """Characters `start` up to `end` of a rendered conversation."""

    start: int
    end: int


# ---------------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(
    path: str, *, chat_template: str | None = None, pad_token: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, certain to have an EOS and a pad token, with the vocabulary it came with.

    Args:
        path: Folder or hub id (`model.path`).
        chat_template: Jinja file that replaces the tokenizer's own template (`model.chat_template`).
        pad_token: Token to pad with (`model.pad_token`); None looks for one. See [Note: padding].
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path={path}: found no tokenizer that loads; expected tokenizer files. {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path={path}: the tokenizer has no EOS token; set `eos_token` in tokenizer_config.json.")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
        _probe(tokenizer, tokenizer.chat_template, name=f"model.chat_template={chat_template}")
    _set_pad(tokenizer, pad_token, path=path)
    return tokenizer


def _read_template(file: str) -> str:
    if not Path(file).is_file():
        raise ValueError(f"model.chat_template={file}: no such file; expected a Jinja chat template.")
    return Path(file).read_text(encoding="utf-8")


def _set_pad(tokenizer: PreTrainedTokenizerBase, asked: str | None, *, path: str) -> None:
    if asked is not None and asked not in tokenizer.get_vocab():
        raise ValueError(
            f"model.pad_token={asked}: not among the {len(tokenizer)} tokens of {path}, and a new token would need a "
            "larger model; name one of them, or null to let one be found."
        )
    pad = asked or _declared_pad(tokenizer) or _unreachable_token(tokenizer)
    if pad is None:
        raise ValueError(f"model.path={path}: found no token to pad with; set model.pad_token to one that no text has.")
    tokenizer.add_special_tokens({"pad_token": pad})
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        logger.warning("model.pad_token=%s is the EOS: exported reward models will score the token before it.", pad)


def _declared_pad(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's own pad token, or one meant for such use, unless it means something else as well."""
    taken = {tokenizer.bos_token_id, *stop_token_ids(tokenizer)}
    declared = tokenizer.added_tokens_encoder
    if tokenizer.pad_token is not None and tokenizer.pad_token_id not in taken:
        return str(tokenizer.pad_token)
    return next((token for token in PAD_LIKE if declared.get(token, tokenizer.eos_token_id) not in taken), None)


def _unreachable_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A token for a byte that UTF-8 never contains, so that no text is ever encoded to it."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"].get("byte_fallback") and "<0xFF>" in tokenizer.get_vocab():
        return "<0xFF>"
    byte_level = '"ByteLevel"' in json.dumps([state["pre_tokenizer"], state["normalizer"]])
    return _renamed_byte(tokenizer, state["model"]) if byte_level and state["model"]["type"] == "BPE" else None


def _renamed_byte(tokenizer: PreTrainedTokenizerFast, model: dict[str, Any]) -> str | None:
    """Rename the token of an impossible byte to NEW_PAD and return that name.

    A byte-level vocabulary writes byte 0xFF as the letter ÿ. Declaring that as the pad token would, once saved and
    loaded again, turn the letter itself into padding; hence the new name for the same id.
    """
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model.pop("merges")]
    vocabulary = model.pop("vocab")
    merged = {symbol for merge in merges for symbol in merge}
    free = [chr(byte) for byte in BYTES_NEVER_IN_UTF8 if chr(byte) in vocabulary and chr(byte) not in merged]
    if not free or NEW_PAD in vocabulary:
        return None
    renamed = {NEW_PAD if token == free[0] else token: index for token, index in vocabulary.items()}
    options = {name: value for name, value in model.items() if name != "type" and value is not None}
    tokenizer.backend_tokenizer.model = BPE(vocab=renamed, merges=merges, **options)
    return NEW_PAD


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of chat template, special token ids and vocabulary size: what two stages must agree on."""
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return _sha256(json.dumps([tokenizer.chat_template, ids, len(tokenizer)], sort_keys=True))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides how a row is tokenised: `template_fingerprint` and the vocabulary."""
    fast = isinstance(tokenizer, PreTrainedTokenizerFast)
    vocabulary = tokenizer.backend_tokenizer.to_str() if fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return _sha256(template_fingerprint(tokenizer) + vocabulary)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """The text of `ids`, special tokens removed and spaces left alone."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """Tokens that end a response: the EOS, the model's own list, and the end of a turn in the chat template."""
    listed = generation_config.eos_token_id if generation_config is not None else None
    ids = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    if tokenizer.chat_template is not None:
        turn_end = _turn_end(tokenizer, tokenizer.get_chat_template())
        ids.append(None if turn_end is None else tokenizer.convert_tokens_to_ids(turn_end))
    return tuple(dict.fromkeys(token for token in ids if token is not None))


@lru_cache(maxsize=16)
def _turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """The control token that the template writes after an answer, if it writes one."""
    controls = {index for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    controls.update(tokenizer.all_special_ids)
    tail = _encode(tokenizer, _probe(tokenizer, template, name="the tokenizer's chat template"))
    return next((tokenizer.convert_ids_to_tokens(token) for token in tail if token in controls), None)


def _probe(tokenizer: PreTrainedTokenizerBase, template: str, *, name: str) -> str:
    """What `template` writes after an assistant's answer; raises ValueError where it does not render."""
    answer = "the-answer-of-a-probe"
    messages = [{"role": "user", "content": "question"}, {"role": ASSISTANT, "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"{name}: cannot render a question and its answer: {error}") from error
    return str(text).rpartition(answer)[2] if answer in str(text) else ""


# --------------------------------------------------------------------------------------------------------- rows


def tokenize_demonstration(tokenizer: PreTrainedTokenizerBase, row: Row, *, response_only: bool) -> Tokens:
    """Tokenise a response to imitate; in `messages`, every assistant turn is one.

    Args:
        tokenizer: From `load_tokenizer`.
        row: `messages`, or `prompt` and `completion`, or a preference (its chosen response), or `text`.
        response_only: Learn the responses and the tokens that end them; False learns the prompts too.
    """
    text = row.get("text")
    if row.get("messages") is not None:
        prompt, response = _last_response(_part(row, "messages"))
    elif row.get("completion") is not None:
        prompt, response = _alike(_part(row, "prompt"), _part(row, "completion"))
    elif row.get("chosen") is not None:
        prompt, response, _ = _pair(row)
    else:
        prompt, response = "", str(text)
    sequence = _start(tokenizer, row, prompt, learn=row.get("messages") is not None)
    return _respond(sequence, row, prompt, response, learn_all=not response_only)


def tokenize_preference(tokenizer: PreTrainedTokenizerBase, row: Row) -> TokenPair:
    """Tokenise `chosen` and `rejected`, whose prompt is in `prompt`, or is what both begin with."""
    prompt, chosen, rejected = _pair(row)
    tokens = [
        _respond(_start(tokenizer, row, prompt), row, prompt, response, learn_all=False)
        for response in (chosen, rejected)
    ]
    return TokenPair(*tokens)


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """The tokens that generation starts from; a row that already has a response gives the prompt of it."""
    return _start(tokenizer, row, _prompt(row)).ids


def readable_prompt(row: Row) -> str:
    """The prompt as people read it: the string, the one question, or the conversation with its roles."""
    prompt = _prompt(row)
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in prompt)


def _prompt(row: Row) -> Part:
    if row.get("messages") is not None:
        messages = _part(row, "messages")
        return _last_response(messages)[0] if messages[-1]["role"] == ASSISTANT else messages
    if row.get("chosen") is not None:
        return _pair(row).prompt
    return _alike(_part(row, "prompt"), _part(row, "completion") if row.get("completion") is not None else None)[0]


def _part(row: Row, name: str) -> Any:
    """A string, or messages without the empty fields that a table gives them."""
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
    """The last assistant turn and everything before it; whatever follows it is nobody's target."""
    turns = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not turns:
        raise ValueError(f"`messages` has roles {[m['role'] for m in messages]}; expected an assistant turn.")
    return messages[: turns[-1]], messages[turns[-1] : turns[-1] + 1]


def _pair(row: Row) -> Pair:
    prompt, chosen, rejected = _part(row, "prompt"), _part(row, "chosen"), _part(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("one of `chosen` and `rejected` is text and the other messages; expected the same of both.")
    carries_prompt = isinstance(chosen, list) and chosen[0]["role"] != ASSISTANT
    if prompt is None or (isinstance(prompt, str) and carries_prompt):
        prompt = _shared_start(chosen, rejected)
    prompt, chosen = _alike(prompt, chosen)
    prompt, rejected = _alike(prompt, rejected)
    if _starts_with(chosen, prompt) and _starts_with(rejected, prompt):
        return Pair(prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    return Pair(prompt, chosen, rejected)


def _starts_with(sequence: Part, start: Part) -> bool:
    return sequence[: len(start)] == start


def _shared_start(chosen: Part, rejected: Part) -> Part:
    """The prompt inside two responses: the shared messages, or the shared text without a word that has begun.

    Strings are cut as in TRL's `extract_prompt` (the space belongs to the response), but never inside a word, and
    after the last `Assistant:` of an HH dialogue, even where both answers begin with the same words.
    """
    shared: Part = os.path.commonprefix([chosen, rejected])  # type: ignore[type-var]
    if isinstance(shared, str):
        spaces = [match.start() for match in re.finditer(r"\s", shared)]
        if HH_TURN in shared:
            shared = shared[: shared.rindex(HH_TURN) + len(HH_TURN)]
        elif spaces:
            shared = shared[: spaces[-1] + (shared[spaces[-1]] != " ")]
    if not shared:
        raise ValueError("`chosen` and `rejected` begin differently; expected a shared prompt or a column `prompt`.")
    return shared


# ----------------------------------------------------------------------------------------------------- sequences


@dataclass
class _Sequence:
    """Text that grows piece by piece, so that the tokens of its start never change."""

    tokenizer: PreTrainedTokenizerBase
    bos: list[int] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    learnt: list[bool] = field(default_factory=list)

    def add(self, piece: str, *, learn: bool) -> None:
        """Append `piece` as the whole text would be tokenised or, where that changes earlier tokens, on its own."""
        whole = [*self.bos, *_encode(self.tokenizer, self.text + piece)]
        known = len(self.ids)
        new = whole[known:] if whole[:known] == self.ids else _encode(self.tokenizer, piece)
        self.text += piece
        self.ids += new
        self.learnt += [learn] * len(new)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _start(tokenizer: PreTrainedTokenizerBase, row: Row, prompt: Part, *, learn: bool = False) -> _Sequence:
    """The sequence up to where the response begins; `learn` makes targets of its earlier assistant turns."""
    if isinstance(prompt, str):
        opening = tokenizer("", verbose=False).input_ids
        adds_bos = opening[:1] == [tokenizer.bos_token_id] and not prompt.startswith(str(tokenizer.bos_token))
        bos = opening[:1] if adds_bos else []
        sequence = _Sequence(tokenizer, bos=bos, ids=[*bos], learnt=[False] * len(bos))
        sequence.add(prompt, learn=False)
        return sequence
    if not prompt or prompt[-1]["role"] == ASSISTANT:
        roles = [message["role"] for message in prompt]
        raise ValueError(f"the prompt has roles {roles}; expected it to end with a turn that the assistant answers.")
    chat = _Chat.of(tokenizer, row)
    sequence = _Sequence(tokenizer)
    text = chat.render(prompt, generation_prompt=True)
    _add_spans(sequence, text, chat.spans(prompt, text) if learn else [])
    return sequence


def _respond(sequence: _Sequence, row: Row, prompt: Part, response: Part, *, learn_all: bool) -> Tokens:
    """Append the response and the token that ends it."""
    num_prompt = len(sequence.ids)
    if isinstance(response, str):
        sequence.add(response, learn=True)
    else:
        _add_turns(sequence, _Chat.of(sequence.tokenizer, row), [*prompt, *response], first=len(prompt))
    if len(sequence.ids) == num_prompt:
        raise ValueError("the response is empty; expected text.")
    if sequence.ids[-1] not in stop_token_ids(sequence.tokenizer):
        sequence.ids.append(sequence.tokenizer.eos_token_id)
        sequence.learnt.append(True)
    target_mask = np.array(sequence.learnt) | learn_all
    target_mask[0] = False  # nothing comes before it that could predict it
    return Tokens(np.array(sequence.ids, dtype=np.int32), target_mask, num_prompt)


def _add_turns(sequence: _Sequence, chat: _Chat, messages: list[Message], *, first: int) -> None:
    """Append the turns from message `first` on, up to the end of the last assistant turn."""
    text = chat.render(messages)
    if not text.startswith(sequence.text):
        raise ValueError(
            "the chat template renders this conversation differently from its own generation prompt, so the answer "
            "would not follow what generation sees; set model.chat_template to a template that does not."
        )
    spans = [span for span in chat.spans(messages, text, first=first) if span.end > len(sequence.text)]
    if not spans:
        raise ValueError("the chat template renders no assistant turn in the response; expected at least one.")
    _add_spans(sequence, text[: spans[-1].end], spans)


def _add_spans(sequence: _Sequence, text: str, spans: Sequence[Span]) -> None:
    """Append the rest of `text`, cut where a span begins or ends; inside a span tokens are learnt."""
    position = len(sequence.text)
    cuts = sorted({position, len(text), *(edge for span in spans for edge in span if edge > position)})
    for start, end in zip(cuts, cuts[1:], strict=False):
        learn = any(span.start <= start and end <= span.end for span in spans)
        sequence.add(text[start:end], learn=learn)


@dataclass(frozen=True)
class _Chat:
    """A chat template with what a row gives it besides messages."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    tools: list[Any] | None
    options: dict[str, Any]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, row: Row) -> _Chat:
        if tokenizer.chat_template is None:
            raise ValueError(
                "the row has messages, but the tokenizer has no chat template; set model.chat_template to a Jinja "
                "file, or give rows with text."
            )
        tools = row.get("tools") or None
        return cls(tokenizer, tokenizer.get_chat_template(tools=tools), tools, row.get("chat_template_kwargs") or {})

    def render(self, messages: list[Message], *, generation_prompt: bool = False) -> str:
        return self._render(messages, generation_prompt, marked=False)[0]

    def _render(self, messages: list[Message], generation_prompt: bool, *, marked: bool) -> tuple[str, list[Any]]:
        settings = {**self.tokenizer.special_tokens_map, **self.options, "add_generation_prompt": generation_prompt}
        try:
            texts, indices = render_jinja_template(
                [messages],
                tools=self.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=marked,
                **settings,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        return texts[0], indices[0] if marked else []

    def spans(self, messages: list[Message], text: str, *, first: int = 0) -> list[Span]:
        """Where the assistant speaks in `text`, from message `first` on, the end of each turn included."""
        turn_end = _turn_end(self.tokenizer, self.template)
        if GENERATION_BLOCK.search(self.template):
            marked = self._render(messages, generation_prompt=False, marked=True)[1]
            ends = [end + len(turn_end) * text.startswith(turn_end, end) if turn_end else end for _, end in marked]
            return [Span(start, end) for (start, _), end in zip(marked, ends, strict=True)]
        turns = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT and index >= first]
        starts = [len(self.render(messages[:turn], generation_prompt=True)) if turn else 0 for turn in turns]
        limits = [*starts[1:], len(text)]
        ends = [self._end(messages[: turn + 1], text[:limit], turn_end) for turn, limit in zip(turns, limits, strict=True)]
        ...
