"""One contender of `ppo_iteration.py`, under its own Python: `python -m benchmarks.ppo_iteration_run CASE`.

Both start from the same folders of weights and take prompts of the same size; sampled tokens differ. A contender's
packages are imported only when it is asked for. Left out: comparing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.rounds import Turns

Case = dict[str, Any]


class Phases:
    """Process time of the phases of an iteration; callable as a stage's stopwatch is."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.process_time()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """All that happens inside belongs to `phase`, and so does what came before it and is in none."""
        yield
        self.end(phase)

    def part(self, name: str) -> AbstractContextManager[None]:  # noqa: ARG002 - as a stopwatch has it
        """A part of a phase is not measured by itself."""
        return nullcontext()

    def end(self, phase: str) -> None:
        """All since the last call belongs to `phase`."""
        now = time.process_time()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._start
        self._start = now

    def take(self) -> dict[str, float]:
        """Seconds of each phase; begins anew."""
        taken, self._seconds = self._seconds, {}
        return taken

    def begin(self) -> None:
        """What has passed since the last phase counts for none."""
        self._start = time.process_time()


def main() -> None:
    """Iterate until there is no further turn."""
    case, turns = json.loads(sys.argv[1]), Turns()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    {"ours": ours, "trl": trl}[case["contender"]](case, turns)


def prompt_ids(case: Case) -> Tensor:
    """Those of one iteration, `[B, P]`."""
    return torch.randint(300, 4000, (case["rows"], case["prompt"]), generator=torch.Generator().manual_seed(0))


def ours(case: Case, turns: Turns) -> None:
    """Iterations as the stage makes them, with its models, batches and metrics; no response may end early."""
    from rlhf.algorithms.ppo import token_rewards
    from rlhf.evaluation.metrics import critic_metrics, rollout_metrics
    from rlhf.reward_calls import RewardFunctions
    from rlhf.runtime.dist import start
    from rlhf.training.ppo_update import advantages_of, mismatch_metrics, training_batch, update_policy
    from rlhf.types import PromptBatch
    from stages.lifecycle.session import stage_tokenizer
    from stages.ppo import load_models, new_collector, next_rollout, score_shaping
    from stages.setup.compose import load_run

    run, world, phases = load_run(Path(case["config"])), start("cpu"), Phases()
    config, shaping = run.ppo, score_shaping(run.ppo)
    models = load_models(run, world, sources=shaping.sources)
    tokenizer = stage_tokenizer(run, config.actor)
    session = SimpleNamespace(run=run, world=world, tokenizer=tokenizer, pad_id=tokenizer.pad_token_id, timer=phases)
    functions = RewardFunctions.load(config, stage="ppo")
    collector = new_collector(session, models, functions=functions, shaping=shaping)
    collector.stop_token_ids = ()
    ids = prompt_ids(case)
    for step in count(1):
        phases.begin()
        numbers = torch.arange(len(ids)) + step * len(ids)
        texts, columns = ("",) * len(ids), ({},) * len(ids)
        prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), numbers, prompts=texts, columns=columns)
        rollout, _ = next_rollout(collector, prompts, loader=SimpleNamespace(iteration=step, drawn=step))
        rewards = token_rewards(rollout.scores, rollout.kl, rollout.response_mask, kl_coef=config.kl.coef)
        estimate = advantages_of(rollout, rewards, config=config)
        batch = training_batch(rollout, estimate, config=config, dtype=models.actor.dtype)
        phases.end("score")
        update_policy(models, batch, config=config, iteration=step, kl_coef=config.kl.coef)
        mismatch_metrics(rollout, batch)
        rollout_metrics(rollout, kl_coef=config.kl.coef, kl_kind=config.kl.kind)
        critic_metrics(rollout, estimate.returns)
        phases.end("train")
        turns.report(phases.take() | {"tokens": int(rollout.response_mask.sum())})


def trl(case: Case, turns: Turns) -> None:
    """PPO of TRL 1.12, the last release that has it; its phases are known by the functions that end them."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    phases, generate, whiten = Phases(), ppo_trainer.batch_generation, ppo_trainer.masked_whiten
    tokens = []

    def generated(*args: Any, **words: Any) -> Any:
        phases.end("train")  # what the iteration before has left to do
        found = generate(*args, **words)
        tokens.append(case["rows"] * (found[0].shape[1] - case["prompt"]))
        phases.end("generate")
        return found

    def whitened(*args: Any, **words: Any) -> Any:
        found = whiten(*args, **words)
        phases.end("score")
        return found

    class Turn(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            phases.end("train")
            turns.report(phases.take() | {"tokens": tokens[-1]})
            phases.begin()

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = generated, whitened
    model, reward = Path(case["folder"]) / "model", Path(case["folder"]) / "reward"
    policies = [AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2)]
    judges = [AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32) for _ in range(2)]
    data = Dataset.from_dict({"input_ids": prompt_ids(case).tolist()})
    trainer = PPOTrainer(
        args=PPOConfig(**_trl_settings(case)),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        model=policies[0],
        ref_model=policies[1],
        reward_model=judges[0],
        value_model=judges[1],
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Turn()],
    )
    trainer.train()


def _trl_settings(case: Case) -> dict[str, Any]:
    settings = {"output_dir": case["folder"] + "/out", "total_episodes": case["rows"] * 100_000, "use_cpu": True}
    settings |= {"per_device_train_batch_size": case["rows"], "local_rollout_forward_batch_size": case["rows"]}
    settings |= {"num_mini_batches": 1, "num_ppo_epochs": case["epochs"], "response_length": case["new"]}
    settings |= {"temperature": 1.0, "kl_coef": 0.05, "num_sample_generations": 0, "bf16": False, "report_to": []}
    settings |= {"gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-6}
    return settings


if __name__ == "__main__":
    main()
