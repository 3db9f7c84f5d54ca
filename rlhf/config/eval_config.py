"""Settings of evaluation and chat."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rlhf.config.bounds import Count, MicroBatchLimit, Natural, require
from rlhf.config.reward_config import RewardSettings
from rlhf.config.stage_configs import SamplingConfig, StageConfig

PPO_REWARDS = "ppo.rewards"
"""Stands for the sources of the PPO stage among those of an evaluation."""


@dataclass(kw_only=True)
class EvalConfig(RewardSettings, StageConfig):
    """Evaluation of a model's responses to held-out prompts, and comparison with another model."""

    name: str | None = None
    """Keeps comparisons apart: results go to `eval/NAME`; with null they replace the last ones in `eval`."""
    model: str | None = None
    """Model to evaluate, a folder or a hub id; null becomes the policy of this run, or the newest in its folder."""
    baseline: str | None = "${output_dir}/sft/model"
    """Model to compare with; null compares with nothing."""
    reference: str | None = "${output_dir}/sft/model"
    """Model from which KL is measured; null measures none."""
    reward: str | None = "${output_dir}/reward/model"
    """The reward model that scores responses, and is itself examined on held-out pairs; null does without."""
    rewards: list[Any] = field(default_factory=lambda: [PPO_REWARDS])
    """Sources that score responses besides `reward`. The entry `ppo.rewards`, the default, stands for those of the PPO
    stage: of this run, or by the record in the folder of `eval.model`; without either, for none."""
    prompts: Count
    """Held-out prompts of `data.ppo` that are answered, the first ones."""
    micro_batch_size: Count
    """Sequences (or pairs) that one rank generates or scores at once: memory, not results."""
    max_prompt_tokens: Count
    """Prompts, of pairs and demonstrations too, that are longer are dropped."""
    max_response_tokens: Count
    """Longest response, in tokens."""
    max_row_tokens: Count
    """Pairs and demonstrations with a longer response are dropped."""
    rows: Natural = 0
    """Held-out pairs and demonstrations that are examined, the first of each; 0 takes all."""
    response_only: bool = True
    """Perplexity of demonstrations is that of their responses; false counts their prompts too."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of responses; a temperature of 0 takes the likeliest token, and KL is then that of temperature 1."""
    judges: list[str] = field(default_factory=lambda: ["reward"])
    """Who says which response is better: `reward` (the reward model), `human` (you, in the terminal), and functions of
    yours as `module:function`; see `rlhf/evaluation/judges.py`."""
    subset: str = "subset"
    """Column of the preference data with the name of the part that a pair belongs to, if it has one."""

    @property
    def micro_batch_limit(self) -> MicroBatchLimit:
        """What goes through a model at once."""
        return MicroBatchLimit(self.micro_batch_size)

    def longest_sequence(self, role: str) -> tuple[str, ...]:
        """The longest prompt with the longest response, which is one to score or one to read."""
        responses = ("max_response_tokens", "max_row_tokens")
        return ("max_prompt_tokens", max(responses, key=lambda setting: int(getattr(self, setting))))

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.name
        plain = name is None or (name.strip(".") != "" and "/" not in name and name.isprintable())
        require(plain, f"eval.name={name!r}: expected the name of a folder, without slashes.")
        twice = sorted({judge for judge in self.judges if self.judges.count(judge) > 1})
        require(not twice, f"eval.judges={self.judges}: {', '.join(twice)} is there twice; expected each judge once.")


class PromptStyle(StrEnum):
    """The prompt of a chat: a conversation in the chat template, or each typed line as it is."""

    template = "template"
    plain = "plain"
    plain_if_own = "plain_if_own"


@dataclass(kw_only=True)
class ChatConfig(StageConfig):
    """A conversation in the terminal."""

    model: str | None = None
    """Who answers: a folder or a hub id; null is the policy of this run, the newest of its folder, or sft/model."""
    compare_with: str | None = None
    """A second model that answers the same; null is nobody."""
    prompts: PromptStyle = PromptStyle.template
    """plain_if_own: plain for a model of this output folder, whose data are plain text, and for the one beside it."""
    system: str = ""
    """System message of the conversation; empty is none."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of answers; a temperature of 0 takes the likeliest token."""
    max_response_tokens: Count = 256
    """Longest answer, in tokens."""
