"""The models of each stage and their roles: the only place that knows.

Loading, the memory plan, DeepSpeed files and every check iterate over `roles_of`. See also: `compatibility.py`, which
checks that the models can be used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from rlhf.config.engine_config import EngineConfig
from rlhf.config.ppo_config import POLICIES
from rlhf.config.reward_config import RewardSettings
from rlhf.config.run_config import STAGES, SUPERVISED, RunConfig
from rlhf.config.stage_configs import LoraConfig, ModelKind, OptimizerConfig

AVERAGE = "_ema"
"""End of the name of a model whose weights are the moving average of another's."""
PRODUCTS = {**dict.fromkeys(SUPERVISED, ("model",)), **dict.fromkeys(POLICIES, ("actor", "critic"))}
"""Names of the models that each stage leaves in its folder, and those of its best evaluation in `best/` there."""
BUILT_ON: dict[str, tuple[str, ...]] = {"sft": (), "reward": ("sft",), "dpo": ("sft",), "ppo": ("sft", "reward")}
"""The stages whose models each stage starts from, unless its settings name others."""


@dataclass(frozen=True)
class Role:
    """One model of a stage: where it starts, what it is, and which settings are its own."""

    stage: str
    name: str
    """Name in the stage, such as "critic"; a trained model is exported under it."""
    _: KW_ONLY
    path: str
    """Folder or hub id that it starts from; empty where this run needs no model of its own for the role."""
    kind: ModelKind
    path_setting: str = ""
    """Rest of the setting that gives `path`, if it is not `name`: "reward" for a critic made from that model."""
    engine: str = "engine"
    """Last part of the setting with its engine."""
    optimizer: str | None = None
    """Last part of the setting with its optimizer; None for a frozen model, which has no adapters either."""
    num_layers: int = 0
    """Use only the first layers; 0 uses all."""
    dropout: float = 0.0
    """Every dropout probability of it."""
    gives_scores: bool = False
    """Its scalar head must have been trained: a reward model."""
    generates: bool = False
    """The other models of the stage read the tokens that it writes."""
    before_training: bool = False
    """It computes before the others are loaded, and is closed then."""
    optional: bool = False
    """The setting may be null."""
    follows: str = ""
    """Name of the role whose weights it is moved towards while the stage trains, frozen as it is."""

    @property
    def setting(self) -> str:
        """Dotted name of the setting that gives its path."""
        return f"{self.stage}.{self.path_setting or self.name}"

    @property
    def is_trained(self) -> bool:
        """Whether it has an optimizer."""
        return self.optimizer is not None

    def engine_config(self, run: RunConfig) -> EngineConfig:
        """Its engine."""
        config: EngineConfig = getattr(run.stage_config(self.stage), self.engine)
        return config

    def optimizer_config(self, run: RunConfig) -> OptimizerConfig | None:
        """Its optimizer, None where it is frozen."""
        return getattr(run.stage_config(self.stage), self.optimizer) if self.optimizer else None

    def lora_config(self, run: RunConfig) -> LoraConfig | None:
        """Its adapters, None where it is frozen."""
        return run.training_config(self.stage).lora if self.optimizer else None

    def __str__(self) -> str:
        return f"{self.setting}={self.path}"


def roles_of(run: RunConfig, stage: str) -> list[Role]:
    """The models that `stage` loads; the first one's tokenizer is the stage's."""
    return [role for role in all_roles(run, stage) if role.path]


def all_roles(run: RunConfig, stage: str) -> list[Role]:
    """The roles of `stage`, also those that need no model of their own in this run but have settings."""
    return _ROLES[stage](run) if stage in _ROLES else _supervised(run, stage)


def _supervised(run: RunConfig, stage: str) -> list[Role]:
    config = run.supervised_config(stage)
    role = Role(
        stage, "model", path=config.init_from, path_setting="init_from", kind=config.kind, optimizer="optimizer"
    )
    return [replace(role, num_layers=config.layers_kept, dropout=config.dropout)]


def _dpo(run: RunConfig) -> list[Role]:
    assert run.dpo is not None
    path = run.dpo.reference or ""  # null is the policy before its first step
    kind = ModelKind.causal_lm
    reference = Role("dpo", "reference", path=path, kind=kind, before_training=True, optional=True)
    return [*_supervised(run, "dpo"), reference]


def _ppo(run: RunConfig) -> list[Role]:
    config = run.ppo
    assert config is not None
    causal_lm, scalar_head = ModelKind.causal_lm, ModelKind.scalar_head
    actor = Role("ppo", "actor", path=config.actor, kind=causal_lm, optimizer="actor_optimizer", generates=True)
    reference = Role(
        "ppo",
        "reference",
        path=config.reference_model or "",  # with LoRA, the actor without its adapters
        path_setting="" if config.reference else "actor",
        kind=causal_lm,
        engine="reference_engine",
        follows="actor" if config.reference_update_every else "",
    )
    rewards = _reward_models("ppo", config, single=config.reward, engine="reward_engine")
    critic = Role(
        "ppo",
        "critic",
        path=config.critic or rewards[0].path or config.actor,
        path_setting="" if config.critic else (rewards[0].setting if rewards[0].path else actor.setting)[len("ppo.") :],
        kind=scalar_head,
        engine="critic_engine",
        optimizer="critic_optimizer",
    )
    return [actor, reference, *rewards, critic if config.has_critic else replace(critic, path="")]


def _reward_models(
    stage: str, config: RewardSettings, *, single: str | None = None, engine: str = "engine"
) -> list[Role]:
    """A role for each reward model among the sources, one without a path where there is none.

    The role of the model that `STAGE.reward` names, which is the only source unless others are given, is "reward".
    """
    role = Role(stage, "reward", path="", kind=ModelKind.scalar_head, engine=engine, gives_scores=True)
    roles = [
        replace(
            role,
            name="reward" if setting == "reward" else f"reward {source.name}",
            path=source.source,
            path_setting=setting,
        )
        for setting, source in config.model_sources(single).items()
    ]
    return roles or [role]


def _eval(run: RunConfig) -> list[Role]:
    config, causal_lm = run.eval, ModelKind.causal_lm
    assert config is not None
    return [
        Role("eval", "model", path=config.model or "", kind=causal_lm, generates=True),
        Role("eval", "baseline", path=config.baseline or "", kind=causal_lm, generates=True, optional=True),
        Role("eval", "reference", path=config.reference or "", kind=causal_lm, optional=True),
        Role(
            "eval",
            "reward",
            path=config.reward or "",
            kind=ModelKind.scalar_head,
            gives_scores=True,
            optional=True,
        ),
        *(role for role in _reward_models("eval", config) if role.path),
    ]


def _chat(run: RunConfig) -> list[Role]:
    assert run.chat is not None
    paths = {"model": run.chat.model or _last_policy(run), "compare_with": run.chat.compare_with}
    return [Role("chat", name, path=path or "", kind=ModelKind.causal_lm) for name, path in paths.items()]


_ROLES: dict[str, Callable[[RunConfig], list[Role]]] = {
    "dpo": _dpo,
    "ppo": _ppo,
    "eval": _eval,
    "chat": _chat,
}


def engines_of(run: RunConfig, stage: str) -> dict[str, EngineConfig]:
    """The engines of a stage by the last part of their setting, also those of roles that this run does not load."""
    return {role.engine: role.engine_config(run) for role in all_roles(run, stage)}


def policy_path(run: RunConfig) -> str:
    """The policy that this run learns from preferences, or the newest one that was made in its output folder."""
    last = next((stage for stage in ("ppo", "dpo") if stage in run.stages), None)
    if last is not None:
        return f"{run.folder(last)}/{PRODUCTS[run.title(last)][0]}"
    policies = [Path(run.output_dir) / name / PRODUCTS[name][0] for name in (*POLICIES, "dpo")]
    found = [policy for policy in policies if policy.exists()]
    return str(max(found, key=lambda policy: policy.stat().st_mtime, default=policies[0]))


def _last_policy(run: RunConfig) -> str:
    """The last policy that this run's folder will have, or has."""
    policy, tuned = policy_path(run), f"{run.output_dir}/sft/model"
    made = [path for path in (policy, tuned) if maker_of(run, path) in run.stages]
    there = [path for path in (policy, tuned) if Path(path).exists()]
    return [*made, *there, policy][0]


def maker_of(run: RunConfig, path: str) -> str | None:
    """The stage of this run's folder that makes the model at `path`, None where none does."""
    folder, root = Path(path).expanduser().absolute(), Path(run.output_dir)
    inside = folder.relative_to(root).parts if folder.is_relative_to(root) else ()
    name, *product = [part for part in inside if part != "best"] or [""]
    trained = [part.removesuffix(AVERAGE) for part in product]
    return run.stage_of(name) if trained in [[made] for made in PRODUCTS.get(name, ())] else None


def origin_of(run: RunConfig, role: Role, *, todo: Collection[str]) -> str:
    """The model that `role` will be made from by stages of `todo` that run before its own; its path where none does."""
    earlier = STAGES[: STAGES.index(role.stage)] if role.stage in STAGES else STAGES
    maker = maker_of(run, role.path)
    if maker not in earlier or maker not in todo:
        return role.path
    start = {made.name: made for made in roles_of(run, maker)}.get(Path(role.path).name.removesuffix(AVERAGE))
    return role.path if start is None else origin_of(run, start, todo=todo)
