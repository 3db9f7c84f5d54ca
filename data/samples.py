"""The samples that stages learn from: demonstrations for SFT, preferences for reward model and DPO, prompts for PPO."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.build_samples import LengthLimits, SampleKind, Splits, build_samples
from data.rows import DEMONSTRATION_COLUMNS, PREFERENCE_COLUMNS, PROMPT_COLUMNS, margin_of
from rlhf.config.data_config import DataConfig, RewrittenTurns
from rlhf.config.eval_config import EvalConfig
from rlhf.config.ppo_config import PPOConfig
from rlhf.config.stage_configs import SFTConfig, SupervisedConfig
from rlhf.text.chat_template import Row
from rlhf.text.tokenize_rows import (
    TokenSequence,
    prompt_of,
    readable_prompt,
    tokenize_as_generated,
    tokenize_demonstration,
    tokenize_preference,
    tokenize_prompt,
)
from rlhf.text.tokenizer import Tokenizer, tokenizer_fingerprint


@dataclass(frozen=True, eq=False)
class Demonstration:
    """One sequence to imitate."""

    input_ids: NDArray[np.int32]  # [T]
    target_mask: NDArray[np.bool_]  # [T], True where the token is learnt

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, eq=False)
class Preference:
    """Two responses to the same prompt, of which people liked one better."""

    chosen: NDArray[np.int32]  # [T], the prompt included
    rejected: NDArray[np.int32]  # [T]
    margin: float  # how much better the chosen one was rated; 0 if unknown
    targets: tuple[NDArray[np.bool_], NDArray[np.bool_]]  # [T] of each, True where the token is an assistant's response
    subset: str = ""  # which part of the data it belongs to, if `eval.subset` names a column
    reference: NDArray[np.float32] = field(default_factory=lambda: np.zeros(2, np.float32))
    """`[2]`, log-probabilities of both responses under a reference; DPO fills them in before training."""

    def __len__(self) -> int:
        return 2 * max(len(self.chosen), len(self.rejected))  # tokens of both in one batch, padding included


@dataclass(frozen=True, eq=False)
class Prompt:
    """The tokens that generation starts from."""

    input_ids: NDArray[np.int32]  # [P]
    text: str  # for people to read
    columns: Mapping[str, Any] = field(default_factory=dict)  # of the row, such as a reference answer: for functions

    def __len__(self) -> int:
        return len(self.input_ids)


def demonstrations(
    data: DataConfig, config: SFTConfig | EvalConfig, *, tokenizer: Tokenizer, held_out: LengthLimits | None = None
) -> Splits[Demonstration]:
    """The samples of `data.sft`; with `held_out`, only those to evaluate on, within these limits.

    Every assistant turn of a conversation is a target, except those that the template rewrites later. The prompt's
    limit holds for all that comes before the last turn.
    """

    def tokenize(row: Row) -> list[TokenSequence]:
        if data.sft.rewritten_turns is RewrittenTurns.as_generated:
            return tokenize_as_generated(tokenizer, row, response_only=config.response_only)
        return [tokenize_demonstration(tokenizer, row, response_only=config.response_only)]

    kind = SampleKind(
        stage="sft",
        alternatives=DEMONSTRATION_COLUMNS,
        limits=held_out or LengthLimits("sft", config.max_prompt_tokens, config.max_response_tokens),
        settings=(
            *("sft", tokenizer_fingerprint(tokenizer)),
            *(f"response_only={config.response_only}", f"rewritten_turns={data.sft.rewritten_turns}"),
        ),
        tokenize=tokenize,
        chat=tokenizer.chat_template is not None,
        build=lambda row, sequences: [Demonstration(tokens.input_ids, tokens.target_mask) for tokens in sequences],
    )
    return build_samples(kind, data, only_held_out=held_out is not None)


def preferences(
    data: DataConfig,
    config: SupervisedConfig | EvalConfig,
    *,
    tokenizer: Tokenizer,
    held_out: LengthLimits | None = None,
    subset_column: str = "",
    stage: str = "reward",
) -> Splits[Preference]:
    """The samples of `data.reward`, or of another `stage`; a pair is dropped if either response is too long.

    With `held_out`, only those to evaluate on, within these limits. `subset_column` names the column that says which
    part of the data a pair belongs to.
    """

    def tokenize(row: Row) -> list[TokenSequence]:
        chosen, rejected = tokenize_preference(tokenizer, row)
        if np.array_equal(chosen.input_ids, rejected.input_ids):
            raise ValueError("`chosen` and `rejected` become the same tokens; expected one to be better.")
        return [chosen, rejected]

    def build(row: Row, sequences: list[TokenSequence]) -> list[Preference]:
        chosen, rejected = sequences
        subset = row.get(subset_column) if subset_column else None
        named, targets = "" if subset is None else str(subset), (chosen.target_mask, rejected.target_mask)
        return [Preference(chosen.input_ids, rejected.input_ids, margin_of(row), targets=targets, subset=named)]

    kind = SampleKind(
        stage=stage,
        alternatives=PREFERENCE_COLUMNS,
        limits=held_out or LengthLimits(stage, config.max_prompt_tokens, config.max_response_tokens),
        settings=("reward", tokenizer_fingerprint(tokenizer)),
        tokenize=tokenize,
        chat=tokenizer.chat_template is not None,
        build=build,
        further_columns=(subset_column,) if subset_column else (),
    )
    return build_samples(kind, data, only_held_out=held_out is not None)


def prompts(
    data: DataConfig,
    config: PPOConfig | EvalConfig,
    *,
    tokenizer: Tokenizer,
    held_out: LengthLimits | None = None,
    columns: Collection[str] | None = (),
) -> Splits[Prompt]:
    """The samples of `data.ppo`; rows that also have responses give their prompts.

    With `held_out`, only those to evaluate on, within these limits. `columns` names further columns that a `Prompt`
    keeps of its row as they are; None keeps all, and a value that cannot be read makes its row a bad one. "prompt"
    among them, or None, keeps the prompt as it was given, text or messages.
    """

    def tokenize(row: Row) -> list[TokenSequence]:
        ids = np.array(tokenize_prompt(tokenizer, row), dtype=np.int32)
        return [TokenSequence(ids, np.zeros(len(ids), dtype=bool), len(ids))]

    def build(row: Row, sequences: list[TokenSequence]) -> list[Prompt]:
        kept = {name: value for name, value in row.items() if columns is None or name in columns}
        kept = {name: value for name, value in kept.items() if name not in ("prompt", "completion")}
        if columns is None or "prompt" in columns:
            kept["prompt"] = prompt_of(row)
        return [Prompt(sequences[0].input_ids, readable_prompt(row), kept)]

    kind = SampleKind(
        stage="ppo",
        alternatives=PROMPT_COLUMNS,
        limits=held_out or LengthLimits("ppo", config.max_prompt_tokens, config.max_response_tokens),
        settings=("ppo", tokenizer_fingerprint(tokenizer)),
        tokenize=tokenize,
        chat=tokenizer.chat_template is not None,
        build=build,
        further_columns=columns,
    )
    return build_samples(kind, data, only_held_out=held_out is not None)


def ptx_texts(data: DataConfig, config: PPOConfig, *, tokenizer: Tokenizer) -> Splits[Demonstration]:
    """The samples of `data.ptx`, which the actor of PPO goes on to learn; none where `ppo.ptx.coef` is 0.

    A text longer than `ppo.ptx.max_tokens` is cut into pieces, each of which begins with the last token of the one
    before: every token is predicted once. Of demonstrations the responses are learnt, as in SFT.

    Raises:
        ValueError: rows that cannot be used, or demonstrations that are all too long.
    """
    if not config.ptx.coef:
        return Splits([], [], {}, fingerprint="")
    longest = config.ptx_tokens

    def tokenize(row: Row) -> list[TokenSequence]:
        tokens = tokenize_demonstration(tokenizer, row, response_only=True)
        return _pieces(tokens, longest) if tokens.num_prompt <= 1 else [tokens]  # a text has no prompt, or a BOS

    kind = SampleKind(
        stage="ptx",
        alternatives=DEMONSTRATION_COLUMNS,
        limits=LengthLimits("ppo.ptx", longest, longest, max_tokens=longest),
        settings=("ptx", tokenizer_fingerprint(tokenizer), f"max_tokens={longest}"),
        tokenize=tokenize,
        chat=tokenizer.chat_template is not None,
        build=lambda row, sequences: [Demonstration(tokens.input_ids, tokens.target_mask) for tokens in sequences],
    )
    return build_samples(kind, data)


def _pieces(tokens: TokenSequence, longest: int) -> list[TokenSequence]:
    """A text in pieces of at most `longest` tokens that overlap by one: nothing predicts the first token of a piece."""
    pieces = []
    for start in range(0, len(tokens.input_ids) - 1, longest - 1):
        ids, mask = tokens.input_ids[start : start + longest], tokens.target_mask[start : start + longest]
        pieces.append(TokenSequence(ids, mask & (np.arange(len(ids)) > 0), 0))
    return pieces


READERS: dict[str, Callable[..., Splits[Any]]] = {
    "demonstrations": demonstrations,
    "preferences": preferences,
    "dpo_preferences": partial(preferences, stage="dpo"),
    "prompts": prompts,
}
"""The readers of a stage's data, by `TrainingConfig.rows`."""
