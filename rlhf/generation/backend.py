"""A generator of the user's own in place of the engine: a server, or another copy of the model. See docs/generation.md.

It is made once on every rank, given all weights before every batch of prompts, and answers the prompts of its rank.
What it returns is checked here, row by row: a wrong log-probability would only show as a policy that does not learn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.generation.generate import Decoding, Generated
from rlhf.generation.sampling import sample_keys
from rlhf.runtime.dist import agreed
from rlhf.runtime.errors import RunError
from rlhf.runtime.user_functions import described, load_function
from rlhf.types import PromptBatch

_SETTING = "ppo.generation_backend"
_ROUNDING = 1e-3  # a log-probability may be above 0 by as much
_SIGNATURE = (
    "made with model, rank and ranks; load_weights(tensors) takes names and tensors, and generate(prompts, seeds, "
    "max_new_tokens, temperature, top_k, top_p, stop_token_ids) returns tokens, log-probabilities and ended for each"
)


class _Row(NamedTuple):
    tokens: Tensor  # [R]
    logprobs: Tensor  # [R] fp32
    ended: bool


@dataclass(frozen=True)
class Backend:
    """The user's generator on this rank."""

    target: str
    """`file.py:Class` or `module:Class`."""
    generator: Any

    @classmethod
    def open(cls, target: str, *, model: str, rank: int, ranks: int) -> Backend:
        """Make it from the folder of the model that training starts from; every rank must call this.

        Raises:
            RunError: it cannot be made, on whichever rank.
        """
        made = cls(target, None)
        with agreed() as outcome:
            found = made._call("its constructor", lambda: find_backend(target)(model=model, rank=rank, ranks=ranks))
            missing = [name for name in ("load_weights", "generate") if not callable(getattr(found, name, None))]
            if missing:
                raise made._error(
                    f"found a {type(found).__name__} without {' and '.join(missing)}; expected {_SIGNATURE}"
                )
            made = cls(target, found)
        if outcome.error:
            raise RunError(outcome.error) from outcome.cause
        return made

    def load(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Hand over the weights; all ranks must call it together, for each tensor may be gathered from all of them.

        Raises:
            RunError: the generator failed, on whichever rank.
        """
        with agreed() as outcome:
            try:
                self._call("load_weights", lambda: self.generator.load_weights(tensors))
            finally:
                deque(tensors, maxlen=0)  # what it left: the other ranks gather every tensor, whatever happened here
        if outcome.error:
            raise RunError(outcome.error) from outcome.cause

    def answer(self, prompts: PromptBatch, *, decoding: Decoding, seed: int, vocabulary: int) -> Generated:
        """Answer this rank's prompts, as `generate` does; all ranks must call it.

        Raises:
            RunError: the generator failed on whichever rank, or what it returned is no answer to these prompts.
        """
        sampling, rows = decoding.sampling, list[_Row]()
        with agreed() as outcome:
            found = self._call(
                "generate",
                lambda: list(
                    self.generator.generate(
                        prompts=prompts.token_ids(),
                        seeds=(sample_keys(seed, prompts.sample_ids) & 2**63 - 1).tolist(),
                        max_new_tokens=decoding.max_new_tokens,
                        temperature=sampling.temperature,
                        top_k=sampling.top_k,
                        top_p=sampling.top_p,
                        stop_token_ids=list(decoding.stop_token_ids),
                    )
                ),
            )
            if len(found) != len(prompts.prompts):
                raise self._error(
                    f"generate gave {len(found)} answers; expected one for each of {len(prompts.prompts)}"
                )
            for number, row in enumerate(found):
                try:
                    rows.append(_checked(row, decoding=decoding, vocabulary=vocabulary))
                except ValueError as error:
                    raise self._error(f"answer {number} of generate has {error}") from error
        if outcome.error:
            raise RunError(outcome.error) from outcome.cause
        return _generated(rows, decoding, device=prompts.input_ids.device)

    def _call(self, what: str, call: Any) -> Any:
        try:
            return call()
        except Exception as error:
            raise self._error(f"{what} failed: {described(error)}") from error

    def _error(self, text: str) -> RunError:
        return RunError(f"{_SETTING}={self.target}: {text}.")


def find_backend(target: str) -> Any:
    """The class that `ppo.generation_backend` names.

    Raises:
        ValueError: there is none.
    """
    return load_function(target, f"{_SETTING}={target}", signature=_SIGNATURE)


def _checked(found: Any, *, decoding: Decoding, vocabulary: int) -> _Row:
    """An answer as tensors, or a ValueError that says what it has and what was expected."""
    try:
        tokens, logprobs, ended = found
        row = _Row(torch.as_tensor(tokens).cpu(), torch.as_tensor(logprobs).cpu().float(), bool(ended))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{found!r:.200}; expected tokens, log-probabilities and whether it ended") from error
    shown, count, limit = f"tokens {row.tokens.tolist()!r:.200}", row.tokens.numel(), decoding.max_new_tokens
    is_whole = not (row.tokens.is_floating_point() or row.tokens.dtype is torch.bool)
    if row.tokens.dim() != 1 or not is_whole or not 1 <= count <= limit:
        raise ValueError(f"{shown}; expected 1 to {limit} whole numbers")
    if row.tokens.min() < 0 or row.tokens.max() >= vocabulary:
        raise ValueError(f"{shown}; expected numbers below {vocabulary}")
    if row.logprobs.shape != row.tokens.shape:
        raise ValueError(f"{count} tokens and log-probabilities {row.logprobs.tolist()!r:.200}; expected one for each")
    if not bool((row.logprobs.isfinite() & (row.logprobs <= _ROUNDING)).all()):
        raise ValueError(f"log-probabilities {row.logprobs.tolist()!r:.200}; expected finite ones, at most 0")
    stops = [place for place, token in enumerate(row.tokens.tolist()) if token in decoding.stop_token_ids]
    if stops != ([count - 1] if row.ended else []):
        raise ValueError(
            f"{shown} and ended={row.ended}; expected a stop token (of {list(decoding.stop_token_ids)}) at its end "
            "if it ended, and none elsewhere"
        )
    return row._replace(tokens=row.tokens.long())


def _generated(rows: Sequence[_Row], decoding: Decoding, *, device: torch.device) -> Generated:
    masks = [torch.ones(len(row.tokens), dtype=torch.bool) for row in rows]
    return Generated(
        responses=pad_sequence([row.tokens for row in rows], True, decoding.pad_id).to(device),  # [B, R]
        response_mask=pad_sequence(masks, True).to(device),
        logprobs=pad_sequence([row.logprobs for row in rows], True).clamp(max=0).to(device),
        ended=torch.tensor([row.ended for row in rows]).to(device),
    )
