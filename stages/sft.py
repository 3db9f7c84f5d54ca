"""Supervised fine-tuning: a pretrained model learns to respond like the demonstrations.

Left out: packing of several demonstrations into one sequence (batches are sorted by length instead).
Run: `python run_pipeline.py stage=sft`.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.collate import collate_demonstrations
from data.loader import EvalBatch
from data.samples import demonstrations
from rlhf.config.run_config import RunConfig
from rlhf.engine.engine import Engine
from rlhf.evaluation.metrics import evaluate_language
from rlhf.runtime.dist import World
from rlhf.training.supervised_step import NextToken
from rlhf.types import SFTBatch
from stages.lifecycle.stage_record import StageRecord
from stages.supervised import SupervisedStage, run_supervised


def run_sft(run: RunConfig, world: World) -> StageRecord:
    """Train `sft/model`."""
    stage = SupervisedStage(
        read=demonstrations, collate=collate_demonstrations, objective=NextToken(), evaluate=_held_out_metrics
    )
    return run_supervised(run, world, name="sft", stage=stage)


def _held_out_metrics(engine: Engine, batches: Sequence[EvalBatch[SFTBatch]]) -> dict[str, float]:
    result = evaluate_language(engine, batches)
    return {"eval/loss": result.loss, "eval/perplexity": result.perplexity, "eval/accuracy": result.accuracy}
