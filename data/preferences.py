"""Preferences: two responses to a prompt, one of which people liked better."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from data.assemble import Limits, Recipe, Splits, assemble
from data.rows import PREFERENCE, check_row, margin_of
from rlhf.config.data_config import DataConfig
from rlhf.config.eval_config import EvalConfig
from rlhf.config.stage_configs import RewardConfig
from rlhf.text.tokenizer import Row, Tokenizer, Tokens, tokenize_preference, tokenizer_fingerprint


@dataclass(frozen=True, eq=False)
class Preference:
    """Two sequences with the same prompt."""

    chosen: NDArray[np.int32]  # [T]
    rejected: NDArray[np.int32]  # [T]
    margin: float  # how much better the chosen one was judged; 0 where unknown
    subset: str = ""  # which part of the data it belongs to, where that was asked for

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


def preferences(
    data: DataConfig, config: RewardConfig | EvalConfig, *, tokenizer: Tokenizer, held_out: Limits | None = None
) -> Splits[Preference]:
    """The samples of `data.reward`; a pair is dropped where either response is too long.

    With `held_out`, those for evaluation alone, within these limits, and with the subset that a row names.
    """
    column = config.subset if isinstance(config, EvalConfig) else ""

    def tokenize(row: Row) -> list[Tokens]:
        check_row(row, PREFERENCE)
        pair = tokenize_preference(tokenizer, row)
        if np.array_equal(pair.chosen.input_ids, pair.rejected.input_ids):
            raise ValueError("`chosen` and `rejected` become the same tokens; expected one to be better.")
        return list(pair)

    recipe = Recipe(
        stage="reward",
        position=1,
        sources=data.reward,
        limits=held_out or Limits("reward", config.max_prompt_tokens, config.max_response_tokens),
        columns=PREFERENCE,
        settings=("preference", tokenizer_fingerprint(tokenizer)),
        tokenize=tokenize,
        build=partial(_build, column=column),
        extra_columns=(column,) if column else (),
        only_held_out=held_out is not None,
    )
    return assemble(recipe, data=data)


def _build(row: Row, sequences: list[Tokens], *, column: str) -> list[Preference]:
    chosen, rejected = sequences
    subset = row.get(column) if column else None
    return [Preference(chosen.input_ids, rejected.input_ids, margin_of(row), "" if subset is None else str(subset))]
