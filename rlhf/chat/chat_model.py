"""A model in a chat: its tokenizer, the prompt it is given, and the answer it streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rlhf.chat.conversation import Conversation, Turn, messages
from rlhf.engine.engine import Engine
from rlhf.generation.generate import Decoding, generate
from rlhf.text.tokenize_rows import tokenize_prompt
from rlhf.text.tokenizer import Tokenizer, decode, load_tokenizer, stop_token_ids
from rlhf.types import PromptBatch

_REPLACEMENT = "\ufffd"
_HELD = 3  # a character has four bytes at most, so up to three tokens wait for its last byte
_WINDOW = 32  # tokens that are decoded again with each new one
_CONTEXT = 8  # tokens that stay when the window moves: some decoders look at what comes before


@dataclass(frozen=True)
class ChatModel:
    """A model that answers; `engine.close()` ends it."""

    label: str
    engine: Engine
    tokenizer: Tokenizer
    positions: int
    """Tokens that prompt and answer may have together."""

    def is_plain(self, conversation: Conversation) -> bool:
        """Whether a line is the whole prompt, without a chat template."""
        return conversation.plain or self.tokenizer.chat_template is None

    def fit_prompt(self, conversation: Conversation, question: str) -> tuple[list[int], int]:
        """The tokens to answer, and how many of the oldest turns had to be left out to make room for an answer.

        Raises:
            ValueError: the template refuses the conversation, or the question alone is too long.
        """
        forgotten = 0
        if self.is_plain(conversation):
            ids = tokenize_prompt(self.tokenizer, {"prompt": question})
        else:
            limit = self.positions - min(conversation.max_response_tokens, self.positions // 2)
            turns = conversation.answered_by(self.label)
            for forgotten in range(len(turns) + 1):
                ids = self._tokenize(turns[forgotten:], question=question, system=conversation.system)
                if len(ids) <= limit:
                    break
        if not 0 < len(ids) < self.positions:
            raise ValueError(
                f"the message has {len(ids)} tokens; expected at least one, and fewer than the {self.positions} "
                f"positions of {self.label}. Shorten it."
            )
        return ids, forgotten

    def check_system(self, text: str) -> None:
        """Raise ValueError if this model's chat template takes no system message."""
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{self.label} has no chat template, and so no place for a system message.")
        try:
            self._tokenize([], question="question", system=text)
        except ValueError as error:
            raise ValueError(f"{self.label} takes no system message: {error}.") from error

    def answer(
        self, ids: Sequence[int], *, conversation: Conversation, sample: int, on_text: Callable[[str], bool]
    ) -> tuple[str, bool]:
        """Answer a prompt and stream the text; returns all of it, and whether it ended with a stop token.

        Args:
            ids: tokens from `fit_prompt`.
            conversation: how the answer is drawn.
            sample: number of the draw.
            on_text: called with each new piece of text; returns False to stop decoding.
        """
        stops = stop_token_ids(self.tokenizer, self.engine.module.generation_config)  # type: ignore[arg-type]
        stream = TextStream(partial(decode, self.tokenizer))

        def on_tokens(rows: torch.Tensor, tokens: torch.Tensor) -> bool:
            token = int(tokens[0])  # waits for the device
            return on_text("" if token in stops else stream.add(token))

        decoding = Decoding(
            min(conversation.max_response_tokens, self.positions - len(ids)),
            stops,
            pad_id=int(self.tokenizer.pad_token_id),
            sampling=conversation.sampling,
        )
        ended = False
        batch = one_prompt(ids, sample=sample, device=self.engine.world.device)
        # A second Ctrl-C raises here, in the middle of a step that takes long; what was streamed so far is the answer.
        with suppress(KeyboardInterrupt), self.engine.generating() as model:
            response = generate(model, batch, decoding=decoding, seed=conversation.seed, on_tokens=on_tokens)  # type: ignore[arg-type]
            ended = bool(response.ended[0])
        on_text(stream.rest())
        return stream.text, ended

    def _tokenize(self, turns: Sequence[Turn], *, question: str, system: str) -> list[int]:
        return tokenize_prompt(self.tokenizer, {"prompt": messages(turns, question, label=self.label, system=system)})


class TextStream:
    """The text of a sequence that grows token by token, in pieces that are never taken back.

    A token may end in the middle of a character. A decoder then shows a replacement character, which the next token
    removes again, so text that could still change is held back until it cannot.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Start with no text; `decode` turns token ids into text."""
        self.text = ""
        """Every piece so far."""
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that are in `text`

    def add(self, token: int) -> str:
        """Add a token; returns the text that has become certain, often none."""
        self._window.append(token)
        piece = self._take(self._certain())
        if len(self._window) > _WINDOW:
            self._move()
        return piece

    def rest(self) -> str:
        """The text that was held back, once no token follows."""
        return self._take(self._decode(self._window))

    def _certain(self) -> str:
        """The text up to the last token that completes a character.

        It is decoded without the tokens after it, since some decoders give up a whole run of bytes for an unfinished
        one. Bytes that can never become text are certain once they are older than `_HELD` tokens.
        """
        whole = decoded = self._decode(self._window)
        for held in range(1, _HELD + 1):
            if not decoded.endswith(_REPLACEMENT):
                return decoded
            decoded = self._decode(self._window[:-held])
        return decoded if not decoded.endswith(_REPLACEMENT) else whole[:-_HELD]

    def _move(self) -> None:
        """Drop old tokens at a place where the rest begins with a whole character and nothing is held back."""
        for start in range(len(self._window) - _CONTEXT - _HELD, len(self._window) - _CONTEXT + 1):
            kept = self._decode(self._window[start:])
            if not kept.startswith(_REPLACEMENT) and not kept.endswith(_REPLACEMENT):
                del self._window[:start]
                self._shown = len(kept)
                return

    def _take(self, decoded: str) -> str:
        piece = decoded[self._shown :]
        self._shown = max(self._shown, len(decoded))
        self.text += piece
        return piece


def one_prompt(ids: Sequence[int], *, sample: int, device: torch.device) -> PromptBatch:
    """A batch of one prompt."""
    tokens = torch.tensor([list(ids)], device=device)  # [1, P]
    mask, sample_ids = torch.ones_like(tokens, dtype=torch.bool), torch.tensor([sample], device=device)
    return PromptBatch(tokens, mask, sample_ids, prompts=("",), columns=({},))


def chat_tokenizer(path: str, *, chat_template: str | None) -> Tokenizer:
    """The tokenizer at `path` with its own chat template, or with `chat_template` if it has none."""
    tokenizer = load_tokenizer(path)
    if tokenizer.chat_template is None and chat_template is not None:
        return load_tokenizer(path, chat_template=chat_template)
    return tokenizer


def labels(paths: Sequence[str]) -> list[str]:
    """Short names that tell models apart: the last two parts of their paths, or more where these are equal."""
    parts = [Path(path).parts for path in paths]
    for length in range(2, max(map(len, parts)) + 1):
        short = ["/".join(part[-length:]).lstrip("/") for part in parts]
        if len(set(short)) == len(paths):
            return short
    return list(paths)
