"""Checks command-line overrides (`NAME=VALUE`) before anything else happens, and explains mistakes in one sentence.

Hydra parses them (https://hydra.cc/docs/advanced/override_grammar/basic). This module adds how to write what hydra
refuses, and refuses what hydra accepts but nothing uses.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from rlhf.config.ppo_config import POLICIES
from rlhf.config.run_config import STAGES, USES, RunConfig
from rlhf.runtime.errors import keep_traceback, sentence_of
from rlhf.runtime.heartbeat import broken_connection
from rlhf.tracking.text_table import printable
from stages.setup.compose import CONF_DIR, composed, is_selected, to_run

_CHOSEN_BY_ENGINE = ("zero_stage", "offload_optimizer", "offload_param")
_NAME = re.compile(r"(\+\+?|~)?[A-Za-z_][\w/-]*(\.\w[\w-]*)*", re.ASCII)
_INSTEAD = {
    "model": "A folder or hub id is given as model=path model.path={}.",
    "data": "Files are given as data=files data.sft.train=[{}], and so for reward and ppo.",
    "engine": "A DeepSpeed file is given as engine.deepspeed={}.",
}
"""Hints for a choice that looks like a path."""
_RENAMED = {
    "optimizer_tier": "offload_optimizer",
    "parameter_tier": "offload_param",
    "no_end_penalty": "missing_eos_penalty",
    "no_end_kind": "missing_eos_mode",
    "against": "baseline",
    "beside": "compare_with",
    "whiten": "scale_advantages",
    "ratio": "ratio_level",
}
"""Earlier names of settings and their present ones."""


@contextmanager
def one_sentence(kind: type[Exception] = ValueError, *, folder: str | None = None) -> Iterator[None]:
    """End the program with one sentence for errors that concern the user; other errors keep their traceback.

    Args:
        kind: errors that always concern the user, besides those that `sentence_of` knows.
        folder: where the traceback is written; HYDRA_FULL_ERROR=1 shows it instead.
    """
    try:
        yield
    except Exception as error:
        sentence = str(error) if isinstance(error, kind) else sentence_of(error) or broken_connection(error)
        if sentence is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        note = keep_traceback(error, Path(folder)) if folder and Path(folder).is_dir() else ""
        sys.exit("\n".join(map(printable, f"error: {sentence}{note}".split("\n"))))


def prepared(words: list[str]) -> list[str]:
    """The overrides as hydra wants them: it adds to a mapping (data.gold.NAME=...) only with `++` in front."""
    return [f"++{word}" if _is_open(word.partition("=")[0]) else word for word in words]


def check_overrides(words: list[str]) -> RunConfig:
    """Compose the run, and find every mistake in the overrides before anything is imported or started.

    Args:
        words: the command line, such as `["stage=sft", "sft.epochs=2"]`.

    Raises:
        ValueError: an override that cannot be parsed, an unknown setting, a value of the wrong type, a choice that does
            not exist, a setting of a stage that is not selected, or anything that `RunConfig` itself refuses.
    """
    words = prepared(words)
    for override in map(_parsed, words):
        _check_kind(override)
    try:
        return to_run(_composed(words))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, words)) from error


def _composed(words: list[str]) -> DictConfig:
    try:
        config = composed(words)
        _check_stages(words, config)
    except (HydraException, OmegaConfBaseException, ValueError):
        # The clearest mistake is a setting of a stage that `stage=` does not select; `sft=null` selects, too.
        _check_stages(words, composed([word for word in words if word.startswith("stage=")]))
        return composed(words)
    return config


def _parsed(word: str) -> Override:
    name, equals, value = word.partition("=")
    if not equals and not word.startswith("~"):
        raise ValueError(f"{word}: expected NAME=VALUE, such as seed=1.")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{word}: {name!r} is no name of a setting; expected one such as sft.optimizer.lr.")
    override = read_override(word)
    if override is None:
        raise ValueError(f"{word}: {_how_to_write(name.lstrip('+'), value)}")
    return override


def read_override(word: str) -> Override | None:
    """Parse one override; None if it is not in hydra's grammar."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _how_to_write(name: str, value: str) -> str:
    """How to write a value that is not in hydra's grammar."""
    at_home = re.sub(r"(?<![\w/])~(?=[/\],]|$)", str(Path.home()), value)
    if at_home != value and read_override(f"{name}={at_home}"):
        return f"~ is not replaced by your home folder here; write {shlex.quote(f'{name}={at_home}')}."
    if _is_open_ended(value):
        return "a bracket or a quotation mark is not closed, or not opened."
    quoted = _quoted(name, value)
    if read_override(f"{name}={quoted}"):
        return f"the value needs quotation marks; write {shlex.quote(f'{name}={quoted}')}."
    return "this value cannot be read; https://hydra.cc/docs/advanced/override_grammar/basic says how to write one."


def _is_open_ended(value: str) -> bool:
    return any(value.count(left) != value.count(right) for left, right in ("[]", "{}")) or any(
        value.count(mark) % 2 for mark in "'\""
    )


def _quoted(name: str, value: str) -> str:
    """The value in quotation marks; of a list, each item that needs them."""
    if value.startswith("[") and value.endswith("]"):
        return "[" + ",".join(_quoted(name, part.strip()) for part in value[1:-1].split(",")) + "]"
    return value if read_override(f"{name}={value}") else '"' + value.replace('"', '\\"') + '"'


def _check_kind(override: Override) -> None:
    """Refuse unknown choices, lists without brackets, and additions to anything but open mappings."""
    name, line = override.key_or_group, override.input_line
    if override.is_delete() or override.is_add() or override.is_force_add():
        if not _is_open(name) or (override.is_delete() and name in _kinds()):
            raise ValueError(f"{line}: nothing but data.gold.NAME=module:function can be added or taken away.")
        return
    if name.split(".")[0] == "hydra":
        raise ValueError(f"{line}: hydra composes the settings and does nothing else; its own change nothing.")
    text, value = str(line).partition("=")[2], override.value()
    if override.is_sweep_override():
        as_list, as_text = shlex.quote(f"{name}=[{text}]"), shlex.quote(f'{name}="{text}"')
        raise ValueError(
            f"{line}: found several values. A list is written {as_list}, a text with commas {as_text}; -m in front of "
            "all words starts a run with each of the values."
        )
    if choices_of(name):
        _check_choice(name, value if isinstance(value, list) else [value], line=str(line))
        return
    kind, is_reference = _kinds().get(name), isinstance(value, str) and value.startswith("${")
    if get_origin(kind) is list and not isinstance(value, list) and not is_reference:
        entry = "" if value is None else text
        raise ValueError(f"{line}: expected a list; write {shlex.quote(f'{name}=[{entry}]')}.")
    if dataclasses.is_dataclass(kind) and not isinstance(value, dict) and not (value is None and name in STAGES + USES):
        first = next(field.name for field in dataclasses.fields(kind) if field.name != "selected")
        raise ValueError(f"{line}: these are many settings; expected one of them, such as {name}.{first}=VALUE.")


def _check_choice(group: str, chosen: list[Any], *, line: str) -> None:
    for choice in chosen:
        if choice not in choices_of(group):
            hint = _INSTEAD.get(group, "").format(choice) if re.search(r"[/.\\~]", str(choice)) else ""
            raise ValueError(f"{line}: expected one of {', '.join(choices_of(group))}. {hint}".rstrip())


def _check_stages(words: list[str], selection: DictConfig) -> None:
    selected = {stage: stage for stage in (*STAGES, *USES) if is_selected(selection, stage)}
    if "ppo" in selected:
        selected["ppo"] = str(selection.ppo.variant)
    for word in words:
        name = word.partition("=")[0].lstrip("+~")
        stage = name.split(".")[0]
        if stage in POLICIES[1:]:
            raise ValueError(f"{word}: the settings of {stage} are those of ppo; write ppo{word[len(stage) :]}.")
        if stage in (*STAGES, *USES) and stage not in selected:
            raise ValueError(
                f"{word}: the stage {stage!r} is not part of this run (selected: {', '.join(selected.values())}). "
                f"Add it, as in 'stage=[{','.join([*selected.values(), stage])}]', or drop the setting."
            )


def overridden_keys(words: list[str]) -> set[str]:
    """Dotted names of the settings that the overrides give; `engine=zero3` counts as the settings that define it."""
    names = set()
    for override in OverridesParser.create().parse_overrides(words):
        names.add(override.key_or_group)
        if override.key_or_group == "engine":
            chosen = OmegaConf.load(Path(CONF_DIR) / "engine" / f"{override.value()}.yaml")
            names |= {f"engine.{name}" for name in map(str, chosen) if name in _CHOSEN_BY_ENGINE}
    return names


def _explain(error: Exception, words: list[str]) -> str:
    cause = error.__cause__ or error
    key = str(getattr(cause, "full_key", None) or "")
    text = " ".join(re.split("full_key:|Config search path:", str(cause))[0].split())
    if isinstance(cause, MissingMandatoryValue):
        return f"{key}: has no value in this combination; give one, as in {key}=VALUE."
    if isinstance(cause, InterpolationResolutionError):
        said = next((word for word in words if "${" in word), key)
        return f"{said}: {text}. ${{NAME}} stands for the value of another setting, such as ${{name}}."
    if "is not Optional" in text:
        return f"{key}: expected a value, found null."
    if "not in" not in text:
        return f"{key}: {text}" if key else text
    if key == "tracking.histograms_every":
        return f"{key}: gradients and weights have no histograms any more; remove the setting (*/grad_norm stays)."
    if (last := key.split(".")[-1]) in _RENAMED:
        return f"{key}: this setting is now called {key.removesuffix(last)}{_RENAMED[last]}."
    same_end = [known for known in known_keys() if known.split(".")[-1] == key.split(".")[-1]]
    same_end.sort(key=lambda known: known.split(".")[0] != key.split(".")[0])
    near = same_end[:3] or difflib.get_close_matches(key, known_keys(), n=3, cutoff=0.5)
    names = [field.name for field in dataclasses.fields(RunConfig)]
    hint = f" Did you mean {' or '.join(near)}?" if near else f" The top level has: {', '.join(names)}."
    return f"{key}: there is no such setting.{hint}"


def known_keys() -> list[str]:
    """Every dotted name of the schema."""
    return sorted(_kinds())


@cache
def _kinds() -> dict[str, Any]:
    """The type of every setting by its dotted name, without the `| None`."""
    return dict(_dotted(RunConfig, ""))


def _dotted(cls: Any, prefix: str) -> list[tuple[str, Any]]:
    found, hints = [], get_type_hints(cls)
    for name in (field.name for field in dataclasses.fields(cls)):
        hint = hints[name]
        kind: Any = next((inner for inner in get_args(hint) if dataclasses.is_dataclass(inner)), hint)
        found += [(prefix + name, kind)] + (_dotted(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [])
    return found


def _is_open(name: str) -> bool:
    """Whether the setting is, or is inside, a mapping with keys chosen by the user."""
    parts = name.split(".")
    outer = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return any(get_origin(_kinds().get(prefix)) is dict for prefix in outer)


def choices_of(group: str) -> list[str]:
    """The choices of a group of `conf/`; empty if there is no such group."""
    return sorted(file.stem for file in (Path(CONF_DIR) / group).glob("*.yaml"))
