"""A model that takes part in a conversation: its tokenizer, its history, and how it answers.

Left out: who is talking to it (`stages/chat.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from rlhf.chat.conversation import Conversation, Fitted, Turn, fit, messages
from rlhf.config.run_config import RunConfig
from rlhf.engine.engine import Engine
from rlhf.generation.generate import Decoding, generate
from rlhf.generation.text_streamer import TextStream
from rlhf.text.tokenizer import Tokenizer, decode, load_tokenizer, stop_token_ids, tokenize_prompt
from rlhf.types import PromptBatch


@dataclass(frozen=True)
class Answer:
    """What was said, as far as it was said."""

    text: str
    ended: bool
    """With a stop token; else it was cut, or interrupted."""


@dataclass
class Speaker:
    """One who answers."""

    label: str
    engine: Engine
    tokenizer: Tokenizer
    positions: int
    """Tokens that prompt and answer may have together."""
    history: list[Turn] = field(default_factory=list)

    def is_plain(self, conversation: Conversation) -> bool:
        """Whether what is typed goes to this model as it is."""
        return conversation.plain or self.tokenizer.chat_template is None

    def prompt(self, conversation: Conversation, question: str) -> Fitted:
        """The tokens that the next answer follows, with as much of the history as fits.

        Raises:
            ValueError: the template refuses the conversation, or the question alone is too long.
        """
        if self.is_plain(conversation):
            fitted = Fitted(tokenize_prompt(self.tokenizer, {"prompt": question}), 0)
        else:
            reserve = min(conversation.max_response_tokens, self.positions // 2)
            tokenize = partial(self._tokenize, question=question, system=conversation.system)
            fitted = fit(self.history, tokenize, limit=self.positions - reserve)
        if not 0 < len(fitted.ids) < self.positions:
            raise ValueError(
                f"the message has {len(fitted.ids)} tokens; expected at least one, and fewer than the "
                f"{self.positions} positions of {self.label}. Say it shorter."
            )
        return fitted

    def check_system(self, text: str) -> None:
        """Raise ValueError where this model has no place for a system message."""
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{self.label} has no chat template, and so no place for a system message.")
        try:
            self._tokenize([], question="question", system=text)
        except ValueError as error:
            raise ValueError(f"{self.label} takes no system message: {error}.") from error

    def answer(
        self, ids: Sequence[int], *, conversation: Conversation, sample: int, show: Callable[[str], bool]
    ) -> Answer:
        """Answer a prompt, piece by piece.

        Args:
            ids: tokens from `prompt`.
            conversation: how the answer is drawn.
            sample: number of the draw.
            show: takes every piece of text, and says whether to go on.
        """
        stops = stop_token_ids(self.tokenizer, self.engine.module.generation_config)
        stream = TextStream(partial(decode, self.tokenizer))

        def hear(rows: torch.Tensor, tokens: torch.Tensor) -> bool:
            token = int(tokens[0])
            return show("" if token in stops else stream.add(token))

        decoding = Decoding(
            min(conversation.max_response_tokens, self.positions - len(ids)),
            stops,
            pad_id=int(self.tokenizer.pad_token_id),
            sampling=conversation.sampling,
        )
        ended = False
        batch = one_prompt(ids, sample=sample, device=self.engine.world.device)
        with suppress(KeyboardInterrupt), self.engine.generating() as model:  # a second one, while a step takes long
            ended = bool(generate(model, batch, decoding=decoding, seed=conversation.seed, hear=hear).ended[0])
        show(stream.rest())
        return Answer(stream.text, ended)

    def _tokenize(self, turns: Sequence[Turn], *, question: str, system: str) -> list[int]:
        return tokenize_prompt(self.tokenizer, {"prompt": messages(turns, question, system=system)})


def one_prompt(ids: Sequence[int], *, sample: int, device: torch.device) -> PromptBatch:
    """A batch of one prompt."""
    tokens = torch.tensor([list(ids)], device=device)
    numbers = torch.tensor([sample], device=device)
    return PromptBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), numbers, prompts=("",))


def speaker_tokenizer(run: RunConfig, path: str) -> Tokenizer:
    """The tokenizer at `path` with its own chat template; one that has none gets `model.chat_template`."""
    tokenizer = load_tokenizer(path)
    if tokenizer.chat_template is None and run.model.chat_template is not None:
        return load_tokenizer(path, chat_template=run.model.chat_template)
    return tokenizer


def labels(paths: Sequence[str]) -> list[str]:
    """The shortest ends of paths, of two names where there are so many, that tell them apart."""
    parts = [Path(path).parts for path in paths]
    for length in range(2, max(map(len, parts)) + 1):
        short = ["/".join(part[-length:]).lstrip("/") for part in parts]
        if len(set(short)) == len(paths):
            return short
    return list(paths)
