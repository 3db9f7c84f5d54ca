"""Preferences: two responses to a prompt, one of which people liked better."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.assemble import Limits, Recipe, Splits, assemble
from data.rows import PREFERENCE, check_row, margin_of
from rlhf.config import DataConfig, RewardConfig
from rlhf.text import Row, Tokenizer, Tokens, tokenize_preference, tokenizer_fingerprint


@dataclass(frozen=True, eq=False)
class Preference:
    """Two sequences with the same prompt."""

    chosen: NDArray[np.int32]  # [T]
    rejected: NDArray[np.int32]  # [T]
    margin: float  # how much better the chosen one was judged; 0 where unknown

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def preferences(data: DataConfig, config: RewardConfig, *, tokenizer: Tokenizer) -> Splits[Preference]:
    """The samples of `data.reward`; a pair is dropped where either response is too long."""

    def tokenize(row: Row) -> list[Tokens]:
        check_row(row, PREFERENCE)
        return list(tokenize_preference(tokenizer, row))

    recipe = Recipe(
        stage="reward",
        position=1,
        sources=data.reward,
        limits=Limits("reward", config.max_prompt_tokens, config.max_response_tokens),
        columns=PREFERENCE,
        settings=("preference", tokenizer_fingerprint(tokenizer)),
        tokenize=tokenize,
        build=_build,
    )
    return assemble(recipe, data=data)


def _build(row: Row, sequences: list[Tokens]) -> Preference:
    chosen, rejected = sequences
    return Preference(chosen.input_ids, rejected.input_ids, margin_of(row))
