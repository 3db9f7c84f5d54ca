"""Translates a command of DeepSpeed-Chat or TRL: the table (`flags.yaml`) decides what it can, and rules the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from rlhf.migrate import deepspeed_chat_rules as chat
from rlhf.migrate import shared_rules as shared
from rlhf.migrate import trl_rules as trl
from rlhf.migrate.flags import Fate, Peer
from rlhf.migrate.translation import Translation, shown

RULES: dict[str, Callable[[Translation], None]] = {
    rule.__name__: rule
    for rule in (
        *(shared.model, shared.batch, shared.lengths, chat.rollout_dsc, trl.rollout_trl, trl.rollout_ppo),
        *(shared.epochs, shared.warmup, chat.data_dsc, chat.rates_dsc, chat.lora_dsc, chat.engine_dsc),
        *(chat.eval_rows, chat.ptx, trl.data_trl, trl.every, trl.learns, trl.betas),
        *(trl.precision_trl, trl.engine_trl, trl.lora_trl, trl.loss_type, trl.rewards),
    )
}
"""In the order in which they run: the length of PPO follows from its batches, and a warm-up is no longer than it."""


def translate(
    peer: Peer, given: Mapping[str, Any], *, step: str, ranks: int = 1, rows: int | None = None
) -> Translation:
    """Settings of the flags that were `given`, and of the defaults of all others.

    Raises:
        ValueError: a flag has a value of another kind than its default.
    """
    found, flags = Translation(peer, step, ranks, rows), peer.steps[step]
    for name, value in given.items():
        _take(found, name, value=value)
    found.put("stage", [step], note=f"{peer.name}, {step}")
    wanted = {flag.target for flag in flags.values() if flag.fate is Fate.rule}
    for name, rule in RULES.items():
        if name in wanted:
            rule(found)
    for name in dict.fromkeys((*flags, *found.given)):
        _apply(found, name)
    for constant in peer.about["constants"][step]:
        found.put(constant["set"], constant["value"], note=constant["note"])
    if ranks > 1:
        found.put("launch.ranks", ranks, note="devices")
    _mention_all(found)
    found.notes += peer.about["differs"][step]
    return found


def _mention_all(found: Translation) -> None:
    """A line for what was given and had no part in anything, such as the epochs of a run with max_steps."""
    sources = [setting.source for setting in found.settings.values()]
    said = " ".join((*sources, *found.reasons[Fate.itself], *found.reasons[Fate.none], *found.notes))
    for name, value in found.given.items():
        if not re.search(rf"--{name}\b", said):
            found.reasons[Fate.itself].append(f"--{name} {shown(value)}".rstrip() + ": nothing to set here")


def _take(found: Translation, name: str, *, value: Any) -> None:
    """Note a flag, if it is known and has a value that can be used."""
    flag = found.peer.flag(found.step, name)
    counts = flag is not None and isinstance(flag.default, int | float) and not isinstance(flag.default, bool)
    if flag is None:
        found.unknown.append(f"--{name}{found.peer.near(found.step, name)}")
    elif value is None and flag.fate in (Fate.set, Fate.rule) and flag.target != "lengths":
        found.notes.append(f"--{name} has no value: its default is taken")
    elif counts and not isinstance(value, int | float | None) and flag.target != "lengths":
        raise ValueError(f"--{name} {shown(value)}: expected a number.")
    else:
        found.given[name] = [value] if flag.kind == "list" and not isinstance(value, list) else value


def _apply(found: Translation, name: str) -> None:
    """What the table says about a flag, if it was given or has a default that a setting takes."""
    flag = found.peer.flag(found.step, name)
    value = found.get(name)
    if flag is None or value is None:
        return
    fitting = flag.fitting(value)
    for setting in flag.settings if fitting not in ([], [None]) else ():
        found.put(setting, fitting[0], name)
    if not fitting:
        found.none(name, flag.otherwise)
    if name in found.given and flag.fate in found.reasons:
        found.reasons[flag.fate].append(f"--{name}: {flag.target}")
    elif name in found.given and flag.note and flag.fate is Fate.set:
        found.notes.append(f"--{name}: {flag.note}")
