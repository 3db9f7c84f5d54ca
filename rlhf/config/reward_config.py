"""Settings of reward sources: reward models and functions of the user's, and how their scores become one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rlhf.config.bounds import Positive, Settings, is_finite, require


class RewardCombination(StrEnum):
    """From the scores of several sources to one."""

    sum = "sum"
    normalized = "normalized"


class RewardErrors(StrEnum):
    """The effect of a response for which a reward function fails."""

    stop = "stop"
    drop = "drop"


@dataclass(kw_only=True)
class RewardSourceConfig(Settings):
    """One source of scores."""

    source: str
    """A reward model, as a folder or hub id; or a function, as `module:function` or `file.py:function`."""
    name: str = ""
    """Name in metrics and samples; empty is the function's, or the last folder of the model."""
    weight: float = 1.0
    """Factor in the sum; a negative one makes it a penalty, and 0 only logs it."""
    normalize: bool | None = None
    """Subtract a mean and divide by a deviation: a model's held-out ones, those of all scores so far for a function.
    null does what `ppo.score.normalize` says for a model, and leaves the scores of a function as they are."""
    clamp: float | None = None
    """Limit of a score, both ways; 0 is none, null that of `ppo.score.clamp` for a normalised one and else none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        last = (
            self.source.rpartition(":")[2].rpartition(".")
            if self.is_function
            else self.source.rstrip("/").rpartition("/")
        )
        self.name = self.name or last[2]

    @classmethod
    def parse(cls, source: Any, setting: str) -> RewardSourceConfig:
        """A source written as text or as a mapping; `setting` names it in messages."""
        if isinstance(source, RewardSourceConfig):
            return source
        given: Any = {"source": source} if isinstance(source, str) else source
        keys = [*cls.__dataclass_fields__]
        require(isinstance(given, dict), f"{setting}={source!r}: expected text, or a mapping with the keys {keys}.")
        unknown = sorted(set(map(str, given)) - set(keys))
        require(not unknown, f"{setting}: unknown {unknown}; expected some of {keys}.")
        text = given.get("source")
        require(isinstance(text, str) and bool(text.strip()), f"{setting}.source={text!r}: {_EXPECTED}.")
        require(":" in text or not text.endswith(".py"), f"{setting}={text}: no function is named; {_EXPECTED}.")
        weight, clamp, normalize = given.get("weight", 1.0), given.get("clamp"), given.get("normalize")
        require(_is_number(weight), f"{setting}.weight={weight!r}: expected a finite number.")
        good = clamp is None or (_is_number(clamp) and clamp >= 0)
        require(good, f"{setting}.clamp={clamp!r}: expected a finite number, 0 or more, or null.")
        good = normalize is None or isinstance(normalize, bool)
        require(good, f"{setting}.normalize={normalize!r}: expected true, false or null.")
        made = cls(source=text, name=str(given.get("name") or ""), weight=weight, normalize=normalize, clamp=clamp)
        good = made.name.isprintable() and made.name != "" and not {" ", "/"} & set(made.name)
        require(good, f"{setting}.name={made.name!r}: expected a name for metrics, without spaces and slashes.")
        return made

    @property
    def is_function(self) -> bool:
        """Whether it is a function and not a model."""
        return ":" in self.source


_EXPECTED = "expected a reward model's path, module:function or file.py:function"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)


@dataclass(kw_only=True)
class RewardSettings(Settings):
    """The sources of a stage, and how functions are called."""

    rewards: list[Any] = field(default_factory=list)
    """Sources as text (a model's path, `module:function`, `file.py:function`), or mappings of `RewardSourceConfig`."""
    reward_timeout_s: Positive = 600.0
    """Seconds that one call of a reward function may take; a longer one ends the run."""
    reward_on_error: RewardErrors = RewardErrors.stop
    """Where a function raises or returns what is no score, stop; or drop the responses for which it does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rewards = [
            RewardSourceConfig.parse(source, f"rewards[{number}]") for number, source in enumerate(self.rewards)
        ]
        names = Counter(source.name for source in self.rewards)
        twice = [name for name, count in names.items() if count > 1]
        example = f"{{source: {next((s.source for s in self.rewards if s.name in twice), '')}, name: OTHER}}"
        require(not twice, f"rewards: two sources are called {', '.join(twice)}; name one, as in {example}.")

    def model_sources(self, single: str | None = None) -> dict[str, RewardSourceConfig]:
        """The sources that are models, by the last part of their setting, which is "reward" for the path `single`."""
        named = {f"rewards[{number}]": source for number, source in enumerate(self.rewards) if not source.is_function}
        return {"reward" if source.source == single else setting: source for setting, source in named.items()}

    @property
    def function_sources(self) -> dict[str, RewardSourceConfig]:
        """The sources that are functions, by the last part of their setting."""
        return {f"rewards[{number}]": source for number, source in enumerate(self.rewards) if source.is_function}
