"""Direct preference optimisation: the policy learns from preferences itself, without a reward model and PPO.

The reference is asked once, before training, for the log-probabilities of all responses that the stage will use, which
checkpoints keep. So no second model is in memory while the policy learns, and resuming needs none.
Left out: a reference that follows the policy. Run: `python run_pipeline.py 'stage=[sft,dpo]'`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch

from data.loader import collate_preferences
from data.samples import Preference
from rlhf.config.roles import Role, roles_of
from rlhf.config.run_config import RunConfig
from rlhf.engine.engine import Engine
from rlhf.evaluation.metrics import evaluate_policy_on_pairs, response_logprobs
from rlhf.micro_batches import deal, pieces_by_length
from rlhf.runtime.dist import World, broadcast_object, sum_over_ranks
from rlhf.runtime.process import free_models
from rlhf.training.supervised_step import dpo_form
from stages.lifecycle.checkpointing import newest_in
from stages.lifecycle.session import Session
from stages.lifecycle.stage_models import open_model
from stages.lifecycle.stage_record import StageRecord
from stages.supervised import Prepared, SupervisedStage, run_supervised


def run_dpo(run: RunConfig, world: World) -> StageRecord:
    """Train `dpo/model`."""
    assert run.dpo is not None
    stage = SupervisedStage(
        collate=collate_preferences,
        evaluate=partial(evaluate_policy_on_pairs, form=dpo_form(run.dpo)),
        prepare=with_reference,
    )
    return run_supervised(run, world, name="dpo", stage=stage)


def with_reference(session: Session, samples: Sequence[Preference], *, open_policy: Callable[[], Engine]) -> Prepared:
    """Ask the reference about `samples`, unless a checkpoint holds its answers, and open the policy.

    The reference is the model that `dpo.reference` names, which is closed before the policy is opened; or the policy
    itself before its first step, whose adapters still add nothing.
    """
    reference, others = ReferenceLogprobs(samples), roles_of(session.run, "dpo")[1:]
    is_known = broadcast_object(newest_in(session.folder) is not None)  # `Session.begin` restores it from there
    for role in [] if is_known else others:
        _ask_named(reference, session, role=role)
        free_models()
    engine = open_policy()
    if not is_known and not others:
        reference.ask(engine, session)
    return Prepared(engine, {"reference": reference})


def _ask_named(reference: ReferenceLogprobs, session: Session, *, role: Role) -> None:
    with closing(open_model(session.run, role, world=session.world)) as engine:
        reference.ask(engine, session)


class ReferenceLogprobs:
    """The reference's log-probabilities of both responses of each sample, which keeps them in `reference`."""

    def __init__(self, samples: Sequence[Preference]) -> None:
        self.samples = samples

    def ask(self, engine: Engine, session: Session) -> None:
        """Let the model of `engine` compute them; all ranks must call it, and share the work."""
        world, limit = session.world, session.run.training_config("dpo").micro_batch_limit
        pieces = pieces_by_length(torch.tensor(list(map(len, self.samples))), limit, ranks=world.size)
        found = torch.zeros(len(self.samples), 2, device=world.device)
        with session.timer("reference"), engine.evaluating() as model:
            for own in (piece.tolist() for piece in deal(pieces, ranks=world.size)[world.rank]):
                # A rank without a row of its own computes another's, because every forward may be a collective.
                batch = collate_preferences([self.samples[number] for number in own or [0]], session.pad_id)
                pairs = response_logprobs(model, batch.to(world.device)).view(2, -1).T  # [2B] -> [B, 2]
                found[own] = pairs[: len(own)]
            self._set(sum_over_ranks(found).cpu().numpy())  # a row is 0 on all ranks but one

    def _set(self, values: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        for sample, pair in zip(self.samples, values, strict=True):
            sample.reference[:] = pair

    def state_dict(self) -> dict[str, str]:
        """All of them, `[N, 2]` fp32, exactly."""
        values = np.stack([sample.reference for sample in self.samples])
        return {"logprobs": base64.b64encode(values.tobytes()).decode()}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Restore what `state_dict` returned."""
        self._set(np.frombuffer(base64.b64decode(state["logprobs"]), dtype=np.float32).reshape(-1, 2))
