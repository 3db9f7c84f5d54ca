"""From YAML and the command line to a `RunConfig`: the only reader of hydra and omegaconf besides `run_pipeline.py`.

Overrides are checked before hydra starts, so that a misspelt key is answered with the nearest right one, and a setting
of a stage that is not selected with the name of the stage. After `to_run` no `DictConfig` is left.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import conf
from rlhf.config import STAGES, USES, ChatConfig, EvalConfig, PPOConfig, RewardConfig, RunConfig, SFTConfig
from rlhf.dist import broadcast_object
from rlhf.files import write_text

CONF_DIR = str(Path(conf.__file__).parent.resolve())
_CHOSEN_BY_ENGINE = ("zero_stage", "optimizer_tier", "parameter_tier")


@dataclasses.dataclass(kw_only=True)
class Schema(RunConfig):
    """`RunConfig` while it is composed: every stage is there, `selected` or not."""

    sft: SFTConfig | None = MISSING
    reward: RewardConfig | None = MISSING
    ppo: PPOConfig | None = MISSING
    eval: EvalConfig | None = MISSING
    chat: ChatConfig | None = MISSING


def register_schema() -> None:
    """Make the typed schema known to hydra as `schema`."""
    ConfigStore.instance().store(name="schema", node=Schema)


def check_overrides(overrides: list[str]) -> None:
    """Compose once for the sake of its errors.

    Args:
        overrides: the command line, such as `["stage=sft", "sft.epochs=2"]`.

    Raises:
        ValueError: an unknown key, a value of the wrong type, a choice that does not exist, a setting of a stage that
            is not selected, or anything that `RunConfig` itself refuses.
    """
    register_schema()
    try:
        with initialize_config_dir(CONF_DIR, version_base=None):
            _check_stages(overrides)
            to_run(compose("config", overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error)) from error


def _check_stages(overrides: list[str]) -> None:
    parsed = OverridesParser.create().parse_overrides(overrides)
    selection = compose("config", overrides=[str(o.input_line) for o in parsed if o.key_or_group == "stage"])
    selected = [stage for stage in (*STAGES, *USES) if _is_selected(selection, stage)]
    for override in parsed:
        stage = override.key_or_group.split(".")[0]
        if (override.is_add() or override.is_force_add()) and not override.key_or_group.startswith("data.gold."):
            raise ValueError(f"{override.input_line}: nothing but data.gold.NAME=module:function can be added.")
        if stage in (*STAGES, *USES) and stage not in selected:
            raise ValueError(
                f"{override.input_line}: the stage {stage!r} is not part of this run "
                f"(selected: {', '.join(selected)}). "
                f"Add it, as in stage=[{','.join([*selected, stage])}], or drop the setting."
            )


def overridden_keys(overrides: list[str]) -> set[str]:
    """Dotted names of the settings that a command line gives, `engine=zero3` being those that tell it from others."""
    names = set()
    for override in OverridesParser.create().parse_overrides(overrides):
        names.add(override.key_or_group)
        if override.key_or_group == "engine":
            chosen = OmegaConf.load(Path(CONF_DIR) / "engine" / f"{override.value()}.yaml")
            names |= {f"engine.{name}" for name in chosen if str(name) in _CHOSEN_BY_ENGINE}
    return names


def _is_selected(config: DictConfig, stage: str) -> bool:
    return not OmegaConf.is_missing(config, stage) and bool(config[stage].selected)


def _explain(error: Exception) -> str:
    cause = error.__cause__ or error
    key = str(getattr(cause, "full_key", None) or "")
    text = " ".join(re.split("full_key:|Config search path:", str(cause))[0].split())
    if isinstance(cause, MissingMandatoryValue):
        return f"{key}: has no value in this combination; give one, as in {key}=VALUE."
    if "not in" not in text:
        return f"{key}: {text}" if key else text
    same_end = [known for known in known_keys() if known.split(".")[-1] == key.split(".")[-1]]
    same_end.sort(key=lambda known: known.split(".")[0] != key.split(".")[0])
    near = same_end[:3] or difflib.get_close_matches(key, known_keys(), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else f" The top level has: {', '.join(_names(RunConfig))}."
    return f"{key}: there is no such setting.{hint}"


def known_keys() -> list[str]:
    """Every dotted name of the schema."""
    return sorted(_dotted(RunConfig, ""))


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _dotted(cls: type, prefix: str) -> list[str]:
    hints, names = get_type_hints(cls), []
    for name in _names(cls):
        names.append(prefix + name)
        inner = [kind for kind in (hints[name], *get_args(hints[name])) if dataclasses.is_dataclass(kind)]
        for kind in inner:
            names += _dotted(kind, f"{prefix}{name}.")
    return names


def to_run(config: DictConfig) -> RunConfig:
    """The typed configuration of the selected stages, with an absolute output folder.

    Raises:
        ValueError: a class refuses its values.
        OmegaConfBaseException: a value is missing or of the wrong type.
    """
    config = config.copy()
    OmegaConf.set_readonly(config, False)
    config.output_dir = str(Path(config.output_dir).expanduser().resolve())
    for stage in (*STAGES, *USES):
        if not _is_selected(config, stage):
            config[stage] = None
    run = OmegaConf.to_object(config)
    assert isinstance(run, RunConfig)
    return run


def load_run(path: Path) -> RunConfig:
    """The configuration that `save_run` wrote."""
    return _from_yaml(path.read_text())


def save_run(run: RunConfig) -> Path:
    """Write the resolved configuration to the output folder, for people and for workers.

    An evaluation by itself leaves that of the stages alone.
    """
    path = Path(run.output_dir) / ("config.yaml" if run.stages else "eval/config.yaml")
    write_text(path, _to_yaml(run))
    return path


def from_first_rank(run: RunConfig) -> RunConfig:
    """The configuration that the first rank has, on every rank."""
    return _from_yaml(broadcast_object(_to_yaml(run)))


def _to_yaml(run: RunConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(run))


def _from_yaml(text: str) -> RunConfig:
    run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Schema), OmegaConf.create(text)))
    assert isinstance(run, RunConfig)
    return run


def as_plain(config: Any) -> dict[str, Any]:
    """A dataclass as plain dictionaries, lists, numbers and strings."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
