"""One contender of `steps.py`, under its own Python: `python -m benchmarks.steps_run CASE`.

All start from the same folder of weights and take the same rows in the same order, so their losses agree. A
contender's packages are imported only when it is asked for. Left out: comparing.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rounds import Steps, Turns
from benchmarks.zero_run import BETAS, CLIP, EPS, plain_training

RATE, BETA = 1e-4, 0.1
BATCHES = 4  # come again and again

Case = dict[str, Any]
Row = dict[str, list[int]]


def rows(case: Case) -> list[Row]:
    """Those of all batches, prompts with two answers; in each batch the whole has from half the length to all of it."""
    number, length, draw = case["rows"], case["length"], random.Random(0)
    found = []
    for row in range(BATCHES * number):
        longer, shorter = (
            length // 2 + (length - length // 2) * (place + 1) // number for place in _places(row, number)
        )
        prompt, chosen, rejected = length // 4, longer - length // 4, shorter - length // 4
        sizes = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        found.append({name: [draw.randrange(300, 4000) for _ in range(size)] for name, size in sizes.items()})
    return found


def _places(row: int, number: int) -> tuple[int, int]:
    return row % number, number - 1 - row % number


def main() -> None:
    """Train until there is no further turn."""
    case, turns = json.loads(sys.argv[1]), Turns()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    {"ours": ours, "plain": plain, "trl": trl}[case["contender"]](case, Steps(turns, case["steps"]))


def batches(samples: list[Any], case: Case, collate: Callable[[list[Any]], Any]) -> Iterator[Any]:
    """One after the other without end, each collated anew, as loaders do."""
    for step in count():
        start = step % BATCHES * case["rows"]
        yield collate(samples[start : start + case["rows"]])


def ours(case: Case, steps: Steps) -> None:
    """A stage's samples, batches, engine and objective, from the configuration that a user would write."""
    from data.loader import collate_demonstrations, collate_preferences
    from rlhf.config.roles import roles_of
    from rlhf.runtime.dist import start
    from rlhf.training.supervised_step import objective_of, take_step
    from stages.lifecycle.stage_models import open_model
    from stages.setup.compose import load_run

    run, stage = load_run(Path(case["config"])), case["stage"]
    engine = open_model(run, roles_of(run, stage)[0], world=start("cpu"), total_steps=1_000_000)
    objective = objective_of(run.training_config(stage))
    collate = partial(collate_demonstrations if stage == "sft" else collate_preferences, pad_id=case["pad_id"])
    samples = [_sample(row, stage) for row in rows(case)]
    if stage == "dpo":
        _ask_reference(engine, samples, case, collate)
    for batch in batches(samples, case, collate):
        steps.done(take_step(engine, [batch], objective=objective)["train/loss"])


def _sample(row: Row, stage: str) -> Any:
    from data.samples import Demonstration, Preference

    def joined(answer: str) -> Demonstration:
        ids = np.array(row["prompt_ids"] + row[answer], dtype=np.int32)
        return Demonstration(ids, np.arange(len(ids)) >= len(row["prompt_ids"]))

    chosen, rejected = joined("chosen_ids"), joined("rejected_ids")
    if stage == "sft":
        return chosen
    return Preference(chosen.input_ids, rejected.input_ids, 0.0, (chosen.target_mask, rejected.target_mask))


def _ask_reference(engine: Any, samples: list[Any], case: Case, collate: Callable[[list[Any]], Any]) -> None:
    from rlhf.evaluation.metrics import response_logprobs

    with engine.evaluating() as model:
        for number, batch in enumerate(islice(batches(samples, case, collate), BATCHES)):
            own = samples[number * case["rows"] : (number + 1) * case["rows"]]
            for sample, pair in zip(own, response_logprobs(model, batch).view(2, -1).T, strict=True):
                sample.reference[:] = pair


def plain(case: Case, steps: Steps) -> None:
    """PyTorch alone: the model of transformers, the loss written out, AdamW; in bf16 with fp32 masters, as ours."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    stage, auto = case["stage"], AutoModelForCausalLM
    if stage == "reward":
        auto = AutoModelForSequenceClassification
    model = auto.from_pretrained(case["model"], dtype=torch.float32).train()
    loss = {"sft": _language_loss, "reward": _pairwise_loss, "dpo": _preference_loss}[stage]
    train = plain_training(model, precision=case["precision"], rate=RATE)
    samples, collate = rows(case), partial(_padded, sides=1 if stage == "sft" else 2, pad_id=case["pad_id"])
    known: list[Tensor] = []
    if stage == "dpo":
        with torch.no_grad():
            known = [_sums(model, *batch) for batch in islice(batches(samples, case, collate), BATCHES)]
    for number, batch in enumerate(batches(samples, case, collate)):
        more = known[number % BATCHES : number % BATCHES + 1]
        steps.done(train([lambda batch=batch, more=more: loss(model, *batch, *more)]))


def _padded(found: list[Row], *, sides: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask of tokens and mask of answers, `[sides x B, T]`."""
    pairs = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids")[:sides] for row in found]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), width), pad_id)
    mask, answers = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for line, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[line, :end], mask[line, :end] = torch.tensor(prompt + answer), 1
        answers[line, len(prompt) : end] = True
    return ids, mask, answers


def _language_loss(model: Any, ids: Tensor, mask: Tensor, answers: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    labels = ids.masked_fill(~answers, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def _pairwise_loss(model: Any, ids: Tensor, mask: Tensor, _: Tensor) -> Tensor:
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(ids)), mask.sum(-1) - 1].float()  # [2B, D]
    chosen, rejected = (last @ model.score.weight.float().T).squeeze(-1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def _preference_loss(model: Any, ids: Tensor, mask: Tensor, answers: Tensor, known: Tensor) -> Tensor:
    chosen, rejected = (_sums(model, ids, mask, answers) - known).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def _sums(model: Any, ids: Tensor, mask: Tensor, answers: Tensor) -> Tensor:
    """Log-probability of each answer, `[2B]`."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    found = -F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (found.view(len(ids), -1) * answers[:, 1:]).sum(-1)


def trl(case: Case, steps: Steps) -> None:
    """A trainer of TRL with its defaults, but without recomputation, logs and files."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # it is tokens already, which the other trainers see for themselves

    class Turn(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.done(losses[-1])

    stage = case["stage"]
    kinds = {"sft": (SFTConfig, SFTTrainer), "reward": (RewardConfig, RewardTrainer), "dpo": (DPOConfig, Prepared)}
    make_config, base = kinds[stage]
    losses: list[float] = []

    class Trainer(base):  # type: ignore[misc, valid-type]
        def training_step(self, *args: Any, **words: Any) -> Tensor:
            loss = super().training_step(*args, **words)
            losses.append(float(loss))
            return loss

    samples = rows(case)
    if stage == "sft":
        whole = [row["prompt_ids"] + row["chosen_ids"] for row in samples]
        labels = [[-100] * len(row["prompt_ids"]) + row["chosen_ids"] for row in samples]
        samples = [{"input_ids": ids, "labels": label} for ids, label in zip(whole, labels, strict=True)]
    if stage == "reward":
        samples = [{side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")} for row in samples]
    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    trainer = Trainer(
        model=auto.from_pretrained(case["model"], dtype=torch.float32),
        args=make_config(**_trl_settings(case)),
        train_dataset=Dataset.from_list(samples),
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
        callbacks=[Turn()],
    )
    trainer.train()


def _trl_settings(case: Case) -> dict[str, Any]:
    settings = {"output_dir": case["folder"], "per_device_train_batch_size": case["rows"], "max_steps": 1_000_000}
    settings |= {"learning_rate": RATE, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_epsilon": EPS}
    settings |= {"max_grad_norm": CLIP, "weight_decay": 0.0, "lr_scheduler_type": "constant", "use_cpu": True}
    settings |= {"bf16": case["precision"] == "bf16", "gradient_checkpointing": False, "disable_tqdm": True}
    settings |= {"logging_strategy": "no", "save_strategy": "no", "report_to": [], "seed": 0}
    settings |= {"train_sampling_strategy": "sequential", "dataloader_pin_memory": False}
    if case["stage"] == "dpo":
        settings |= {"beta": BETA, "precompute_ref_log_probs": True}
    return settings


if __name__ == "__main__":
    main()
