"""Checks the user's functions before any model is loaded: they can be imported, and the data have their columns.

See also: reward models, which are checked as all models are (`compatibility.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from data.build_samples import Splits
from data.samples import Prompt
from rlhf.config.ppo_config import PPOConfig
from rlhf.config.run_config import RunConfig
from rlhf.generation.backend import find_backend
from rlhf.reward_calls import RewardFunctions, missing_columns


def check_rewards(run: RunConfig, stage: str) -> None:
    """Import the reward functions of a stage and its generator, and check that its `reward` is used.

    Raises:
        ValueError: a function cannot be used, or a reward model was named that is not among the sources.
    """
    config = run.ppo if stage == "ppo" else run.eval if stage == "eval" else None
    if config is None:
        return
    RewardFunctions.load(config, stage=stage)
    if stage == "ppo" and run.ppo is not None and run.ppo.generation_backend is not None:
        find_backend(run.ppo.generation_backend)
    single, default = config.reward, f"{run.output_dir}/reward/model"
    if stage == "ppo" and single != default and "reward" not in config.model_sources(single):
        raise ValueError(
            f"ppo.reward={single} is not among ppo.rewards, which says what the sources are; expected one of the two. "
            "Leave ppo.reward out, or add '${ppo.reward}' to the list."
        )


def check_reward_columns(
    functions: RewardFunctions,
    splits: Mapping[str, Sequence[Prompt]],
    *,
    reread: Callable[[], Mapping[str, Sequence[Prompt]]],
) -> None:
    """Check that the data have the columns that reward functions need.

    Args:
        functions: of the stage.
        splits: the rows of each part of the data, by its setting.
        reread: reads the same rows with every column, for the message.

    Raises:
        ValueError: a column that no row has, with those that there are.
    """
    for name, rows in splits.items():
        for column, function in missing_columns(functions, [row.columns for row in rows]).items() if rows else ():
            there = sorted({key for row in reread()[name] for key in row.columns} - {"prompt"})
            raise ValueError(
                f"{function.setting} reads the column `{column}`, which {name} lacks; found the further columns "
                f"{there}. Where it has another name there, give the source as {{path: FILE, columns: {{{column}: "
                f"ITS_NAME}}}}, in quotes; or give the parameter a default."
            )


def read_prompts(config: PPOConfig, read: Callable[..., Splits[Prompt]]) -> Splits[Prompt]:
    """The prompts with the columns that reward functions read; `read` is `prompts` without that argument."""
    functions = RewardFunctions.load(config, stage="ppo")

    def parts(splits: Splits[Prompt]) -> dict[str, Sequence[Prompt]]:
        return {"data.ppo.train": splits.train, "the held-out part of data.ppo": splits.eval}

    splits = read(columns=functions.columns)
    check_reward_columns(functions, parts(splits), reread=lambda: parts(read(columns=None)))
    return splits
