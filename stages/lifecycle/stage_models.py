"""Opens and exports the models of a stage, and warns if a type would round away what adapters have learnt.

See also: `rlhf/models/export.py` for the format of a model folder.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.config.ppo_config import PPOConfig
from rlhf.config.roles import Role
from rlhf.config.run_config import RunConfig
from rlhf.config.stage_configs import ModelKind
from rlhf.engine.engine import Engine, build_engine
from rlhf.engine.loss_scale import LossScale
from rlhf.models.causal_lm import causal_lm
from rlhf.models.export import export
from rlhf.models.fp32_matmul import multiply_with_onednn
from rlhf.models.model_folder import local_folder
from rlhf.models.model_spec import ModelSpec
from rlhf.models.scalar_head import scalar_head_model
from rlhf.rewards import RunningScale, ScoredSource, ScoreScale
from rlhf.runtime.dist import World, broadcast_object
from rlhf.text.tokenizer import Tokenizer
from stages.lifecycle.stage_record import read_record

log = logging.getLogger(__name__)

_ENOUGH = 0.99
"""Share of the adapters' change that merged weights must keep. In a Llama of width 576, with alpha / rank = 2 and a
normal B, bf16 keeps 25 % at a deviation of 1e-4, 84 % at 5e-4 and 99.9 % at 2e-3."""


@dataclass(frozen=True)
class Merge:
    """How the adapters of a model were merged into the weights of its folder."""

    summed_in: str
    """Type in which weight and adapter were added."""
    stored_in: str
    """Type of the files, to which the sum was rounded."""
    kept: float
    """Share of the adapters' change that the files keep."""
    working_type: str
    """Type of the working weights in training."""
    kept_in_working_type: float
    """Share of the change that this type would keep."""


def export_model(engine: Engine, folder: Path, *, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Export the model of `engine` to `folder` for plain transformers; all ranks must call it.

    Merged adapters are stored in the type of the working weights, or in fp32 where that would lose more than 1 % of
    what they change.

    Returns:
        The fields of `Merge`, for the record; None without adapters.
    """
    kept = _write(engine, folder, tokenizer=tokenizer)
    if kept is None:
        return None
    stored, kept_in_working = engine.dtype, kept
    if kept < _ENOUGH and engine.dtype is not torch.float32:
        if engine.world.is_main:
            shutil.rmtree(folder)  # never more than one on the disk, as the plan says
        stored = torch.float32
        kept = _write(engine, folder, tokenizer=tokenizer, dtype=stored)
        assert kept is not None
    merge = Merge(_name(torch.float32), _name(stored), kept, _name(engine.dtype), kept_in_working)
    log.info("%s: %s", folder, _sentence(merge))
    return asdict(merge)


def open_engine(spec: ModelSpec, **settings: Any) -> Engine:
    """Call `build_engine(spec, **settings)`; warn if its working weights lose what an earlier stage learnt."""
    engine = build_engine(spec, **settings)
    if engine.dtype is torch.float32 and settings["config"].fast_fp32_matmul:
        multiply_with_onednn(spec.config.hidden_size, world=engine.world)
    folder = Path(spec.config.name_or_path or "")
    record = read_record(folder)
    for found in record.merged.values() if record else ():
        merge = Merge(**found)
        if merge.kept_in_working_type < _ENOUGH and engine.dtype is not torch.float32 and engine.world.is_main:
            log.warning(
                "%s: %s. Working weights in %s round it away again where they compute (what trains keeps it in its "
                "fp32 masters); precision=fp32 of this engine computes with all of it.",
                folder,
                _sentence(merge),
                _name(engine.dtype),
            )
    return engine


def open_model(
    run: RunConfig,
    role: Role,
    *,
    world: World,
    total_steps: int = 0,
    loss_scale: LossScale | None = None,
    head_scale: float = 1.0,
) -> Engine:
    """The engine of one role of a stage.

    Args:
        run: the whole configuration.
        role: one of `roles_of(run, stage)`.
        world: this process among its peers.
        total_steps: of its optimizer, for the schedule; a frozen model takes none.
        loss_scale: shared with another engine in fp16; None gives it one of its own.
        head_scale: what a scalar head is multiplied by.
    """
    engine = role.engine_config(run)
    shared: dict[str, Any] = {"dropout": role.dropout, "lora": role.lora_config(run), "attention": engine.attention}
    shared["seed"] = run.stage_config(role.stage).seed
    if role.kind is ModelKind.causal_lm:
        spec = causal_lm(role.path, **shared)
    else:
        spec = scalar_head_model(role.path, num_layers=role.num_layers, head_scale=head_scale, **shared)
    others = [f"{name}={value:g}" for name, value in spec.found_dropout.items() if value != role.dropout]
    if others:  # adapters have `lora.dropout`
        log.info("%s: dropout is %g in this stage, in place of %s", role, role.dropout, ", ".join(others))
    return open_engine(
        spec,
        config=engine,
        world=world,
        optimizer=role.optimizer_config(run),
        total_steps=total_steps,
        loss_scale=loss_scale,
    )


def _write(engine: Engine, folder: Path, *, tokenizer: Tokenizer, dtype: torch.dtype | None = None) -> float | None:
    tensors, write = engine.full_tensors(), engine.world.is_main
    kept = export(engine.module, tensors, folder=folder, tokenizer=tokenizer, write=write, dtype=dtype)
    return broadcast_object(kept)


def _sentence(merge: Merge) -> str:
    if merge.stored_in == merge.working_type:
        return (
            f"adapters merged in {merge.summed_in} and stored in {merge.stored_in}, which keeps {merge.kept:.2%} of "
            "what they change; adapter/ has all of it"
        )
    return (
        f"merged adapters are stored in {merge.stored_in}, because {merge.working_type} would keep only "
        f"{merge.kept_in_working_type:.1%} of what they change"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def scored_sources(config: PPOConfig) -> list[ScoredSource]:
    """The reward sources, each with the scale by which it is normalised: stored by the reward stage, or a running one.

    Raises:
        ValueError: the scores of a model are to be normalised and their scale is unknown, or 0.
    """
    settings = {source.name: f"ppo.{setting}" for setting, source in config.model_sources(config.reward).items()}
    sources = []
    for source in config.rewards:
        normalizes = source.normalize
        if normalizes is None:
            normalizes = config.score.normalize and not source.is_function
        scale: ScoreScale | RunningScale | None = None
        if normalizes:
            scale = RunningScale() if source.is_function else _score_scale(source.source, setting=settings[source.name])
        usual = config.score.clamp if normalizes else 0.0
        clamp = usual if source.clamp is None else source.clamp
        sources.append(ScoredSource(source.name, weight=source.weight, scale=scale, clamp=clamp))
    return sources


def _score_scale(path: str, *, setting: str) -> ScoreScale:
    """Mean and standard deviation by which a model's scores are normalised, as the reward stage stored them."""
    scale = stored_scale(path)
    if scale is None:
        raise ValueError(
            f"ppo.score.normalize needs the held-out mean and deviation of {setting}={path}, which has no "
            f"stage.json with score_mean and score_std. Train it with stage=reward, or set ppo.score.normalize=false."
        )
    if not scale.std > 0:
        raise ValueError(
            f"{setting}={path} scores all held-out responses alike, so its scores cannot be normalised, and "
            f"there is nothing that PPO could learn from them. Train it again, for longer or from another model."
        )
    return scale


def stored_scale(path: str) -> ScoreScale | None:
    """The scale in the `stage.json` of the model at `path`, None if there is none."""
    record = read_record(local_folder(path))
    if record is None or record.score_mean is None or record.score_std is None:
        return None
    return ScoreScale(mean=record.score_mean, std=record.score_std)


def known_quality(paths: Sequence[str]) -> dict[str, float]:
    """Held-out quality in the `stage.json` of the first of these reward models, under the names that PPO logs."""
    record = read_record(local_folder(paths[0])) if paths else None
    after = {} if record is None else record.after
    names = ("accuracy", "pairs", "score_std")
    return {f"reward_model/{name}": after[f"eval/{name}"] for name in names if f"eval/{name}" in after}
