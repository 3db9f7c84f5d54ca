"""The settings of the two stages that train nothing: evaluation and chat."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from rlhf.config.bounds import Count, Natural, require
from rlhf.config.stage_configs import SamplingConfig, StageConfig


@dataclass(kw_only=True)
class EvalConfig(StageConfig):
    """What a model says to held-out prompts, judged, and compared with what another says."""

    name: str | None = None
    """Keeps comparisons apart: results go to `eval/NAME`; with null they replace the last ones in `eval`."""
    model: str | None = None
    """What is evaluated: a folder or a hub id; null becomes the policy of this run, or the newest of its folder."""
    baseline: str | None = "${output_dir}/sft/model"
    """What it is compared with; null compares with nothing."""
    reference: str | None = "${output_dir}/sft/model"
    """What KL is measured from; null measures none."""
    reward: str | None = "${output_dir}/reward/model"
    """The reward model that scores responses, and is itself examined on held-out pairs; null does without."""
    prompts: Count
    """Held-out prompts of `data.ppo` that are answered, the first ones."""
    micro_batch_size: Count
    """Sequences (or pairs) that one rank generates or scores at once: memory, not results."""
    max_prompt_tokens: Count
    """Prompts, of pairs and demonstrations too, that are longer are dropped."""
    max_response_tokens: Count
    """Where generation stops."""
    max_row_tokens: Count
    """Pairs and demonstrations with a longer response are dropped."""
    rows: Natural = 0
    """Held-out pairs and demonstrations that are examined, the first of each; 0 takes all."""
    response_only: bool = True
    """Perplexity of demonstrations is that of their responses; false counts their prompts too."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are drawn; with a temperature of 0 the likeliest token, and KL is then that of temperature 1."""
    judges: list[str] = field(default_factory=lambda: ["reward"])
    """Who says which response is better: `reward` (the reward model), `human` (you, in the terminal), and functions of
    yours as `module:function`; see `rlhf/evaluation/judges.py`."""
    subset: str = "subset"
    """Column of the preference data that says which part of it a pair belongs to, where it has one."""

    def longest_sequence(self) -> tuple[str, ...]:
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
    """What a model reads: a conversation in its chat template, or what was typed as it is, each line by itself."""

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
    """How answers are drawn; a temperature of 0 takes the likeliest token."""
    max_response_tokens: Count = 256
    """Where an answer is cut."""
