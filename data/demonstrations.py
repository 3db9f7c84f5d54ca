"""Demonstrations: what SFT imitates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.assemble import Limits, Recipe, Splits, assemble
from data.rows import DEMONSTRATION, check_row
from rlhf.config.data_config import DataConfig, RewrittenTurns
from rlhf.config.eval_config import EvalConfig
from rlhf.config.stage_configs import SFTConfig
from rlhf.text.tokenizer import (
    Row,
    Tokenizer,
    Tokens,
    tokenize_as_generated,
    tokenize_demonstration,
    tokenizer_fingerprint,
)


@dataclass(frozen=True, eq=False)
class Demonstration:
    """One sequence to imitate."""

    input_ids: NDArray[np.int32]  # [T]
    target_mask: NDArray[np.bool_]  # [T], True where the token is learnt

    def __len__(self) -> int:
        return len(self.input_ids)


def demonstrations(
    data: DataConfig, config: SFTConfig | EvalConfig, *, tokenizer: Tokenizer, held_out: Limits | None = None
) -> Splits[Demonstration]:
    """The samples of `data.sft`; with `held_out`, those for evaluation alone, within these limits.

    Of a conversation every assistant turn is a target, but for those that the template has rewritten; the limits are
    for the last turn and for all before it.
    """

    def tokenize(row: Row) -> list[Tokens]:
        check_row(row, DEMONSTRATION)
        if data.sft.rewritten_turns is RewrittenTurns.as_generated:
            return tokenize_as_generated(tokenizer, row, response_only=config.response_only)
        return [tokenize_demonstration(tokenizer, row, response_only=config.response_only)]

    recipe = Recipe(
        stage="sft",
        position=0,
        sources=data.sft,
        limits=held_out or Limits("sft", config.max_prompt_tokens, config.max_response_tokens),
        columns=DEMONSTRATION,
        settings=(
            *("demonstration", tokenizer_fingerprint(tokenizer)),
            *(f"response_only={config.response_only}", f"rewritten_turns={data.sft.rewritten_turns}"),
        ),
        tokenize=tokenize,
        build=_build,
        only_held_out=held_out is not None,
    )
    return assemble(recipe, data=data)


def _build(row: Row, sequences: list[Tokens]) -> list[Demonstration]:
    return [Demonstration(tokens.input_ids, tokens.target_mask) for tokens in sequences]
