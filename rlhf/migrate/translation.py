"""A command of DeepSpeed-Chat or TRL as settings of this project: what the rules and the table add to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.migrate.flags import Fate, Peer


@dataclass(frozen=True)
class TracedSetting:
    """A setting and where it comes from."""

    value: Any
    source: str
    is_default: bool
    """Whether nobody wrote it."""


@dataclass
class Translation:
    """What becomes of one command."""

    peer: Peer
    step: str
    ranks: int = 1
    rows: int | None = None
    """Rows of the training data, where they are known."""
    steps: int | None = None
    """Optimizer steps, where they are known."""
    given: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, TracedSetting] = field(default_factory=dict)
    reasons: dict[Fate, list[str]] = field(default_factory=lambda: {Fate.itself: [], Fate.none: []})
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        """First part of the stage's settings."""
        return "ppo" if self.step in ("grpo", "rloo") else self.step

    @property
    def optimizers(self) -> list[str]:
        """Dotted names of the optimizers: in PPO, those of actor and critic."""
        own = f"{self.stage}.actor_optimizer" if self.stage == "ppo" else f"{self.stage}.optimizer"
        return [own, *["ppo.critic_optimizer"] * (self.step == "ppo")]

    @property
    def updates(self) -> int:
        """Optimizer steps of an iteration of PPO; 1 in stages that count steps."""
        if self.stage != "ppo":
            return 1
        epochs = next(filter(None, map(self.get, ("ppo_epochs", "num_ppo_epochs", "num_iterations"))))
        return int(self.value("ppo.rollout_size") // self.value("ppo.minibatch_size") * epochs)

    def get(self, name: str) -> Any:
        """The value of a flag, given or theirs by default; None for one that the step does not have."""
        flag = self.peer.flag(self.step, name)
        return self.given.get(name, flag.default if flag else None)

    def value(self, setting: str) -> Any:
        """The value of a setting that a rule has put."""
        return self.settings[setting].value

    def put(self, setting: str, value: Any, *flags: str, note: str = "") -> None:
        """Set a setting from flags; the first that sets it decides, unless a later one was given."""
        written = [f"--{flag} {shown(self.given[flag])}".rstrip() for flag in flags if flag in self.given]
        theirs = [f"--{flag} {shown(self.get(flag))}".rstrip() for flag in flags if self.get(flag) is not None]
        source = ", ".join(written) or note or ", ".join(theirs or [f"no --{flag}" for flag in flags])
        for optimizer in self.optimizers if setting.startswith("O.") else [""]:
            name = setting.replace("S.", f"{self.stage}.").replace("O.", f"{optimizer}.")
            if name not in self.settings or (written and self.settings[name].is_default):
                self.settings[name] = TracedSetting(value, source, not written)

    def none(self, flag: str, reason: str) -> None:
        """A flag as given has no counterpart."""
        self.reasons[Fate.none].append(f"--{flag} {shown(self.given.get(flag, ''))}".rstrip() + f": {reason}")


def shown(value: Any) -> str:
    """A flag's value as it was written."""
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)


def scalar(text: str) -> Any:
    """A word as a number, or true or false, where it is one."""
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    return text


def override(name: str, value: Any) -> str:
    """A word NAME=VALUE of this project's command line."""
    return f"{name}={_written(value)}"


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return "[" + ",".join(map(_written, value)) + "]"
    plain = not isinstance(value, str) or re.fullmatch(r"[\w./+@%?|$-][\w./+@%?|$:-]*|\$\{[\w.]+\}[\w./-]*", value)
    return str(value) if plain else json.dumps(value, ensure_ascii=False)
