"""Prompts: what PPO answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.assemble import Limits, Recipe, Splits, assemble
from data.rows import PROMPT, check_row
from rlhf.config.data_config import DataConfig
from rlhf.config.eval_config import EvalConfig
from rlhf.config.stage_configs import PPOConfig
from rlhf.text.tokenizer import Row, Tokenizer, Tokens, readable_prompt, tokenize_prompt, tokenizer_fingerprint


@dataclass(frozen=True, eq=False)
class Prompt:
    """The tokens that generation starts from."""

    input_ids: NDArray[np.int32]  # [P]
    text: str  # for people to read

    def __len__(self) -> int:
        return len(self.input_ids)


def prompts(
    data: DataConfig, config: PPOConfig | EvalConfig, *, tokenizer: Tokenizer, held_out: Limits | None = None
) -> Splits[Prompt]:
    """The samples of `data.ppo`; rows that also have responses give their prompts.

    With `held_out`, those for evaluation alone, within these limits instead of the stage's.
    """

    def tokenize(row: Row) -> list[Tokens]:
        check_row(row, PROMPT)
        ids = np.array(tokenize_prompt(tokenizer, row), dtype=np.int32)
        return [Tokens(ids, np.zeros(len(ids), dtype=bool), len(ids))]

    recipe = Recipe(
        stage="ppo",
        position=2,
        sources=data.ppo,
        limits=held_out or Limits("ppo", config.max_prompt_tokens, config.max_response_tokens),
        columns=PROMPT,
        settings=("prompt", tokenizer_fingerprint(tokenizer)),
        tokenize=tokenize,
        build=_build,
        only_held_out=held_out is not None,
    )
    return assemble(recipe, data=data)


def _build(row: Row, sequences: list[Tokens]) -> list[Prompt]:
    return [Prompt(sequences[0].input_ids, readable_prompt(row))]
