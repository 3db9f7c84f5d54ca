"""Reward modelling: a scalar head on a decoder learns which of two responses people prefer.

Left out: several objectives, ordinal ratings. Run: `python run_pipeline.py stage=reward`.
"""

from __future__ import annotations

from data.loader import collate_preferences
from rlhf.config.run_config import RunConfig
from rlhf.evaluation.metrics import evaluate_preferences
from rlhf.runtime.dist import World
from stages.lifecycle.stage_record import StageRecord
from stages.supervised import SupervisedStage, run_supervised


def run_reward(run: RunConfig, world: World) -> StageRecord:
    """Train `reward/model`; its record holds the held-out mean and deviation by which PPO normalises scores."""
    stage = SupervisedStage(
        collate=collate_preferences,
        evaluate=evaluate_preferences,
        score_units=lambda after: (after["eval/score_mean"], after["eval/score_std"]),
    )
    return run_supervised(run, world, name="reward", stage=stage)
