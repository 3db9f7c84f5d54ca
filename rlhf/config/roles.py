"""Which models a run names: the roles of each stage and use, and the stage that makes a model of this run's folder.

Left out: whether the models can be used (`compatibility.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rlhf.config.engine_config import EngineConfig
from rlhf.config.eval_config import ChatConfig, EvalConfig
from rlhf.config.run_config import STAGES, RunConfig
from rlhf.config.stage_configs import POLICIES, AdvantageKind, PPOConfig, RewardConfig, SFTConfig


class ModelKind(StrEnum):
    """What a decoder ends with: logits over the vocabulary, or one number per position."""

    causal_lm = "causal_lm"
    scalar_head = "scalar_head"


PRODUCTS = {"sft": ("model",), "reward": ("model",), **dict.fromkeys(POLICIES, ("actor", "critic"))}
"""What each stage leaves in its folder; the same of its best evaluation is in `best/` there."""


@dataclass(frozen=True)
class Role:
    """A model that a stage, or a use, starts from."""

    stage: str
    name: str
    """Of the setting that names it."""
    path: str
    """A folder or a hub id."""
    head: ModelKind
    """What the stage has it end with."""
    scores: bool = False
    """It must have a scalar head that was trained: a reward model."""
    writes: bool = False
    """Its tokens are what the other models of the stage read."""
    num_layers: int = 0
    """How many of its layers are used; 0 all."""
    optional: bool = False
    """The setting may be null."""

    @property
    def setting(self) -> str:
        """Dotted name of the setting."""
        return f"{self.stage}.{self.name}"

    def __str__(self) -> str:
        return f"{self.setting}={self.path}"


def roles_of(run: RunConfig, stage: str) -> list[Role]:
    """The models that `stage` starts from; the first is the one whose tokenizer the stage uses."""
    config = getattr(run, stage)
    if isinstance(config, SFTConfig):
        return [Role(stage, "init_from", config.init_from, ModelKind.causal_lm)]
    if isinstance(config, RewardConfig):
        return [Role(stage, "init_from", config.init_from, ModelKind.scalar_head, num_layers=config.num_layers)]
    if isinstance(config, PPOConfig):
        return _roles_of_ppo(config)
    if isinstance(config, EvalConfig):
        return _roles_of_eval(config)
    assert isinstance(config, ChatConfig), stage
    named = {"model": config.model or _last_policy(run), "compare_with": config.compare_with}
    return [Role("chat", name, path, ModelKind.causal_lm) for name, path in named.items() if path is not None]


def _roles_of_ppo(config: PPOConfig) -> list[Role]:
    roles = [Role("ppo", "actor", config.actor, ModelKind.causal_lm, writes=True)]
    if config.reference is not None:
        roles.append(Role("ppo", "reference", config.reference, ModelKind.causal_lm))
    roles.append(Role("ppo", "reward", config.reward, ModelKind.scalar_head, scores=True))
    if config.critic is not None and config.advantage is AdvantageKind.gae:
        roles.append(Role("ppo", "critic", config.critic, ModelKind.scalar_head))
    return roles


def _roles_of_eval(config: EvalConfig) -> list[Role]:
    assert config.model is not None, "composition fills it"
    roles = [Role("eval", "model", config.model, ModelKind.causal_lm, writes=True)]
    if config.baseline is not None:
        roles.append(Role("eval", "baseline", config.baseline, ModelKind.causal_lm, writes=True, optional=True))
    if config.reference is not None:
        roles.append(Role("eval", "reference", config.reference, ModelKind.causal_lm, optional=True))
    if config.reward is not None:
        roles.append(Role("eval", "reward", config.reward, ModelKind.scalar_head, scores=True, optional=True))
    return roles


def _last_policy(run: RunConfig) -> str:
    """The last policy that this run's folder will have, or has."""
    actor, tuned = f"{policy_folder(run)}/actor", f"{run.output_dir}/sft/model"
    made = [path for path, stage in {actor: "ppo", tuned: "sft"}.items() if stage in run.stages]
    there = [path for path in (actor, tuned) if Path(path).exists()]
    return [*made, *there, actor][0]


def engines_of(run: RunConfig, stage: str) -> dict[str, EngineConfig]:
    """The engines of a stage by the name of their setting: one, or in PPO one for each model."""
    config = getattr(run, stage)
    return {name: getattr(config, name) for name in vars(config) if name.endswith("engine")}


def policy_folder(run: RunConfig) -> str:
    """Where the policy is that this run makes, or the newest that was made in its folder."""
    if run.ppo is not None:
        return run.folder("ppo")
    found = [folder for name in POLICIES if (folder := Path(run.output_dir) / name) and (folder / "actor").exists()]
    return str(max(found, key=lambda folder: (folder / "actor").stat().st_mtime, default=run.folder("ppo")))


def maker_of(run: RunConfig, path: str) -> str | None:
    """The stage of this run's folder that makes the model at `path`, if any does."""
    folder, root = Path(path).expanduser().absolute(), Path(run.output_dir)
    inside = folder.relative_to(root).parts if folder.is_relative_to(root) else ()
    name, *product = [part for part in inside if part != "best"] or [""]
    return run.stage_of(name) if [*product] in [[made] for made in PRODUCTS.get(name, ())] else None


def origin_of(run: RunConfig, role: Role, *, todo: Collection[str]) -> str:
    """The model that `role` will be made from by stages of `todo` that run before its own; its path where none does."""
    earlier = STAGES[: STAGES.index(role.stage)] if role.stage in STAGES else STAGES
    maker = maker_of(run, role.path)
    if maker not in earlier or maker not in todo:
        return role.path
    roles = {made_from.name: made_from for made_from in roles_of(run, maker)}
    start = roles.get("init_from") or roles["actor"]
    if maker == "ppo" and role.path.endswith("critic"):
        start = roles.get("critic") or roles["reward"]
    return origin_of(run, start, todo=todo)
