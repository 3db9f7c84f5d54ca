"""SFT: a pretrained model learns to answer as the demonstrations do.

Left out: packing of several demonstrations into one sequence (batches are sorted by length instead).
Run: `python run_pipeline.py stage=sft`.
"""

from __future__ import annotations

from torch import Tensor

from data.collate import collate_demonstrations
from data.demonstrations import demonstrations
from data.loader import TrainLoader, evaluation_batches, steps_of
from rlhf.algorithms.sft import count_targets, sft_loss
from rlhf.config.run import RunConfig
from rlhf.dist import World
from rlhf.engine.engine import Engine, build_engine
from rlhf.evaluation import evaluate_language
from rlhf.models.causal_lm import causal_lm
from rlhf.models.positions import position_ids
from rlhf.types import SFTBatch
from stages.handover import Record
from stages.session import open_session
from stages.supervised import Outcome, supervise


class NextToken:
    """Learn the target tokens of demonstrations."""

    def count(self, batch: SFTBatch) -> Tensor:
        """Target tokens of a micro-batch."""
        return count_targets(batch.target_mask)

    def outcome(self, engine: Engine, batch: SFTBatch, *, denominator: Tensor) -> Outcome:
        """Cross-entropy of the target tokens."""
        logits = engine(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=position_ids(batch.attention_mask),
            use_cache=False,
        ).logits
        result = sft_loss(logits, batch.input_ids, batch.target_mask, denominator=denominator)
        return Outcome(result.loss, {"train/accuracy": result.accuracy})


def run_sft(run: RunConfig, world: World) -> Record:
    """Train `sft/model` and leave its record."""
    config = run.sft
    assert config is not None
    with open_session(run, "sft", world=world, init_from=config.init_from) as session:
        splits = demonstrations(run.data, session.tokenizer, config=config)
        loader, held_out = session.supervised_batches(splits, collate_demonstrations, config=config)
        session.start(total_steps=loader.steps)
        blueprint = causal_lm(config.init_from, dropout=config.dropout, lora=config.lora, seed=config.seed)
        engine = build_engine(
            blueprint, config=config.engine, world=world, optimizer=config.optimizer, total_steps=loader.steps
        )
