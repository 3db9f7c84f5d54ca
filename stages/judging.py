"""Whether the reward model can judge this actor: one vocabulary, one template, and scores of a known scale."""

from __future__ import annotations

from pathlib import Path

from rlhf.config import PPOConfig
from rlhf.models.checkpoint import local_folder
from rlhf.models.scalar_head import has_scalar_head
from rlhf.rollout import ScoreScale
from rlhf.text import Tokenizer, load_tokenizer, template_fingerprint
from stages.handover import read_record


def check_judges(config: PPOConfig, tokenizer: Tokenizer) -> None:
    """The reward model has a head that was trained, and all models read the tokens that the actor writes.

    Raises:
        ValueError: which does not, and what to do.
    """
    folder = local_folder(config.reward)
    if not has_scalar_head(folder):
        raise ValueError(
            f"ppo.reward={config.reward} is a language model without a scalar head; expected a reward model, an "
            f"AutoModelForSequenceClassification with one label. Train one with stage=reward."
        )
    for setting, path in {"reward": config.reward, "critic": config.critic, "reference": config.reference}.items():
        if path is not None:
            check_vocabulary(
                f"ppo.{setting}={path}", load_tokenizer(path), actor=tokenizer, actor_name=f"ppo.actor={config.actor}"
            )
    check_template(f"ppo.reward={config.reward}", folder, actor=tokenizer, actor_name=f"ppo.actor={config.actor}")


def check_template(name: str, folder: Path, *, actor: Tokenizer, actor_name: str) -> None:
    """The model in `folder`, if a stage of ours has made it, was trained with the template of the actor.

    Raises:
        ValueError: with another one.
    """
    record = read_record(folder)
    if record is not None and record.template != template_fingerprint(actor):
        raise ValueError(
            f"{name} was trained with another chat template or other special tokens than those of "
            f"{actor_name}. Train both from the same model, or set model.chat_template for both."
        )


def check_vocabulary(name: str, found: Tokenizer, *, actor: Tokenizer, actor_name: str) -> None:
    """The model called `name` reads the tokens that the one called `actor_name` writes.

    Raises:
        ValueError: it would read other text.
    """
    theirs, ours = found.get_vocab(), actor.get_vocab()
    differing = [token for token, index in theirs.items() if ours.get(token, index) != index]
    if differing or len(theirs) < len(ours):
        raise ValueError(
            f"{name} has another vocabulary than {actor_name} ({len(theirs)} tokens against {len(ours)}, "
            f"{len(differing)} of them with other ids): it would read other text than the actor writes. "
            f"Choose a model of the same family."
        )


def score_scale(config: PPOConfig) -> ScoreScale:
    """The held-out mean and deviation that the reward stage stored, or 0 and 1 where scores are not normalised.

    Raises:
        ValueError: scores are to be normalised and their scale is unknown.
    """
    if not config.score.normalize:
        return ScoreScale()
    scale = stored_scale(config.reward)
    if scale is None:
        raise ValueError(
            f"ppo.score.normalize needs the held-out mean and deviation of ppo.reward={config.reward}, which has no "
            f"stage.json with score_mean and score_std. Train it with stage=reward, or set ppo.score.normalize=false."
        )
    return scale


def stored_scale(path: str) -> ScoreScale | None:
    """The scale in the record beside the model at `path`, None where there is none."""
    record = read_record(Path(path))
    if record is None or record.score_mean is None or record.score_std is None:
        return None
    return ScoreScale(mean=record.score_mean, std=record.score_std)
