"""Supervised fine-tuning: a pretrained model learns to respond like the demonstrations.

Left out: packing of several demonstrations into one sequence (batches are sorted by length instead).
Run: `python run_pipeline.py stage=sft`.
"""

from __future__ import annotations

from data.loader import collate_demonstrations
from rlhf.config.run_config import RunConfig
from rlhf.evaluation.metrics import evaluate_language
from rlhf.runtime.dist import World
from stages.lifecycle.stage_record import StageRecord
from stages.supervised import SupervisedStage, run_supervised


def run_sft(run: RunConfig, world: World) -> StageRecord:
    """Train `sft/model`."""
    stage = SupervisedStage(collate=collate_demonstrations, evaluate=evaluate_language)
    return run_supervised(run, world, name="sft", stage=stage)
