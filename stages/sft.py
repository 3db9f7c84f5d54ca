"""Supervised fine-tuning: a pretrained model learns to respond like the demonstrations.

Left out: packing of several demonstrations into one sequence (batches are sorted by length instead).
Run: `python run_pipeline.py stage=sft`.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial

from data.collate import collate_demonstrations
from data.samples import demonstrations
from rlhf.config.roles import roles_of
from rlhf.config.run_config import RunConfig
from rlhf.evaluation.metrics import evaluate_language
from rlhf.runtime.dist import World
from rlhf.training.supervised_step import NextToken
from stages.lifecycle.session import open_session, stage_tokenizer
from stages.lifecycle.stage_models import open_model
from stages.lifecycle.stage_record import StageRecord
from stages.supervised import held_out_batches, supervise, train_loader


def run_sft(run: RunConfig, world: World) -> StageRecord:
    """Train `sft/model`."""
    config = run.sft
    assert config is not None
    (role,) = roles_of(run, "sft")
    tokenizer = stage_tokenizer(run, role.path)
    splits = demonstrations(run.data, config, tokenizer=tokenizer)
    collate = partial(collate_demonstrations, pad_id=int(tokenizer.pad_token_id))
    loader = train_loader(splits.train, collate, config=config, world=world)
    held_out = held_out_batches(splits.eval, collate, config=config, world=world)
    with open_session(run, "sft", world=world, tokenizer=tokenizer, total_steps=loader.steps) as session:
        engine = open_model(run, role, world=world, total_steps=loader.steps)
        with closing(engine):
            supervise(
                session,
                engine,
                loader=loader,
                objective=NextToken(),
                evaluate=lambda: evaluate_language(engine, held_out),
                eval_every=config.eval_every,
                data=splits.fingerprint,
            )
            session.export()
        return session.finish()
