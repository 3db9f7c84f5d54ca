"""Composes YAML files and command-line overrides into a typed `RunConfig`; no `DictConfig` leaves this module.

See also: `command_line.py`, which refuses unusable overrides.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from rlhf.config.eval_config import PPO_REWARDS, EvalConfig
from rlhf.config.reward_config import RewardSourceConfig
from rlhf.config.roles import maker_of, policy_path
from rlhf.config.run_config import STAGES, USES, RunConfig
from rlhf.runtime.atomic_files import write_text
from stages.lifecycle.stage_settings import settings_behind

CONF_DIR = str(Path(conf.__file__).parent.resolve())


Schema = dataclasses.make_dataclass(
    "Schema",
    [(stage, get_type_hints(RunConfig)[stage], MISSING) for stage in (*STAGES, *USES)],
    bases=(RunConfig,),
    kw_only=True,
)
"""`RunConfig` during composition: it has every stage, `selected` or not."""
Schema.__module__ = __name__  # where pickle looks for it


def register_schema() -> None:
    """Register the typed schema with hydra, and the resolver `${by_rank:RANK,WHOLE,LORA}`.

    The resolver picks a number by whether a stage trains the whole model (rank 0) or adapters.
    """
    ConfigStore.instance().store(name="schema", node=Schema)
    OmegaConf.register_new_resolver("by_rank", lambda rank, whole, lora: lora if rank else whole, replace=True)


def composed(words: Sequence[str]) -> DictConfig:
    """Compose the YAML files with command-line overrides."""
    register_schema()
    with initialize_config_dir(CONF_DIR, version_base=None):
        return compose("config", overrides=list(words))


def is_selected(config: DictConfig, stage: str) -> bool:
    """Whether the run includes a stage."""
    return not OmegaConf.is_missing(config, stage) and config[stage] is not None and bool(config[stage].selected)


def to_run(config: DictConfig) -> RunConfig:
    """The typed configuration of the selected stages, with an absolute output folder.

    Raises:
        ValueError: a value is refused; the message begins with the dotted name of its setting.
        OmegaConfBaseException: a value is missing or of the wrong type.
    """
    config = config.copy()
    OmegaConf.set_readonly(config, False)
    if not config.output_dir.strip():
        raise ValueError("output_dir is empty; expected a folder, such as output_dir=outputs/NAME.")
    config.output_dir = str(Path(config.output_dir).expanduser().resolve())
    for stage in (*STAGES, *USES):
        if not is_selected(config, stage):
            config[stage] = None
    try:
        run = OmegaConf.to_object(config)
    except OmegaConfBaseException:
        raise
    except ValueError as error:
        raise ValueError(_placed(config, str(error))) from error
    assert isinstance(run, RunConfig)
    if run.eval is not None:
        model = run.eval.model or policy_path(run)
        run.eval = _evaluation(run, dataclasses.replace(run.eval, model=model), model=model)
    return run


def _evaluation(run: RunConfig, config: EvalConfig, *, model: str) -> EvalConfig:
    """The evaluation of `model` by what it was trained on: without a reward model that neither it nor the run has."""
    usual = f"{run.output_dir}/reward/model"
    single, sources = _sources_of_ppo(run, model)
    is_made_here = run.dpo is not None or run.ppo is not None or maker_of(run, model) in ("dpo", "ppo")
    will_be_there = run.reward is not None or usual in [source.source for source in sources] or Path(usual).exists()
    if is_made_here and config.reward == usual and not will_be_there:
        judges = [judge for judge in config.judges if judge != "reward"]
        config = dataclasses.replace(config, reward=None, judges=judges)
    own = [source for source in config.rewards if source.source != PPO_REWARDS]
    if own != config.rewards:
        # The reward model is measured by itself, as `eval.reward`; and a source that is named again has its new name.
        known = {single, config.reward, *(source.source for source in own)}
        own = [*(source for source in sources if source.source not in known), *own]
    try:
        return dataclasses.replace(config, rewards=own)
    except ValueError as error:  # names that are there twice
        raise ValueError(f"eval.{error}") from error


def _sources_of_ppo(run: RunConfig, model: str) -> tuple[str, list[RewardSourceConfig]]:
    """`ppo.reward` and `ppo.rewards` of this run, or of the one that made `model`; empty where neither has PPO."""
    if run.ppo is not None:
        return run.ppo.reward, run.ppo.rewards
    settings, sources = settings_behind(model), defaultdict[str, dict[str, Any]](dict)
    for name, value in settings.items():
        if name.startswith(f"{PPO_REWARDS}."):
            place, _, key = name.removeprefix(f"{PPO_REWARDS}.").partition(".")
            sources[place][key] = value
    return settings.get("ppo.reward", ""), [RewardSourceConfig(**given) for given in sources.values()]


def _placed(config: DictConfig, message: str) -> str:
    """Complete the setting that an error message of a settings class begins with to its full dotted name."""
    group = _refused_group(config)
    said = re.match(r"[\w.]+", message)
    setting = said[0].rpartition(".")[2] if said else ""
    if not group or (said and said[0].startswith(f"{group}.")):
        return message
    if said is None or setting not in OmegaConf.select(config, group):
        is_inner = said is not None and said[0].split(".")[0] in OmegaConf.select(config, group)
        return f"{group}.{message}" if is_inner else f"{group}: {message}"
    return _given_as(config, f"{group}.{setting}") + message[len(said[0]) :]


def _given_as(config: DictConfig, name: str) -> str:
    """The setting that `name` takes its value from, such as `seed` for `sft.seed`; `name` if it has one of its own."""
    group, _, last = name.rpartition(".")
    node = (OmegaConf.select(config, group) if group else config)._get_node(last)
    assert node is not None, name
    reference = re.fullmatch(r"\$\{([\w.]+)\}", str(node._value()))
    return _given_as(config, reference[1]) if reference else name


def _refused_group(config: DictConfig, path: str = "") -> str | None:
    """Dotted name of the innermost group that refuses its values, None if none does."""
    for name in map(str, config):
        inner = config._get_node(name)
        if isinstance(inner, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(inner)):
            found = _refused_group(inner, f"{path}.{name}".lstrip("."))
            if found is not None:
                return found
    try:
        OmegaConf.to_object(config)
    except OmegaConfBaseException:
        return None
    except ValueError:
        return path
    return None


def load_run(path: Path) -> RunConfig:
    """The configuration that `save_run` wrote."""
    return from_yaml(path.read_text())


def save_run(run: RunConfig) -> Path:
    """Write the resolved configuration to the output folder, for people and for the ranks.

    A run that only evaluates writes its own file and leaves the one of the stages alone.
    """
    path = Path(run.output_dir) / ("config.yaml" if run.stages else "eval/config.yaml")
    write_text(path, to_yaml(run))
    return path


def to_yaml(run: RunConfig) -> str:
    """The whole configuration as YAML, resolved."""
    return OmegaConf.to_yaml(OmegaConf.structured(run))


def from_yaml(text: str) -> RunConfig:
    """The configuration that `to_yaml` wrote."""
    run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Schema), OmegaConf.create(text)))
    assert isinstance(run, RunConfig)
    return run
