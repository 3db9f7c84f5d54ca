"""One contender of `generation.py`, or one rank of it: `python -m benchmarks.generation_run TASK`.

A task is a contender, its folder of weights, and cases that are answered one after the other, each in several turns.
All contenders get the same prompts, and as many tokens for each. Left out: comparing.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from benchmarks.rounds import Turns
from rlhf.config.roles import roles_of
from rlhf.config.stage_configs import SamplingConfig
from rlhf.generation import generate as decoding_loop
from rlhf.generation.generate import Decoding
from rlhf.generation.slots import Slots, Step
from rlhf.models.fp32_matmul import multiply_with_onednn
from rlhf.rollout import generate_responses
from rlhf.runtime.dist import World, start, sum_over_ranks
from rlhf.types import PromptBatch
from stages.lifecycle.stage_models import open_model
from stages.setup.compose import load_run

Case = dict[str, Any]
Answer = Callable[[Case], list[list[int]]]
"""The tokens of every response; none from who only multiplies."""
LONG = 8
"""Of unequal responses, one in so many is as long as allowed, and the others are at most that part of it."""


def main() -> None:
    """Answer every case in `rounds` turns; rank 0 starts the other ranks and speaks for all."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    turns = None
    if int(os.environ.get("RANK", 0)) == 0:
        turns = Turns()
        _start_others(int(os.environ.get("WORLD_SIZE", 1)))
    world = start("cpu")  # waits for them
    answer = CONTENDERS[task["contender"]](task, world)
    answer(task["cases"][0] | {"new": 2, "lengths": "equal"})  # warms up
    if turns:
        turns.report({})
    for case in task["cases"]:
        for _ in range(task["rounds"]):
            found = _turn(answer, case)
            if turns:
                turns.report(found)


def _start_others(ranks: int) -> None:
    command = [sys.executable, "-m", "benchmarks.generation_run", sys.argv[1]]
    for rank in range(1, ranks):
        variables = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _turn(answer: Answer, case: Case) -> dict[str, Any]:
    """Process time of all ranks together, and this rank's responses."""
    begin = time.process_time()
    responses = answer(case)
    spent = torch.tensor(time.process_time() - begin, dtype=torch.float64)
    return {"cpu_seconds": float(sum_over_ranks(spent)), "responses": responses}


def limits(case: Case) -> list[int]:
    """Tokens of each response; of unequal ones, a long one lies somewhere in every group of `LONG`."""
    new, count, draw = case["new"], case["prompts"], random.Random(0)
    if case["lengths"] == "equal":
        return [new] * count
    found = [draw.randint(1, max(new // LONG, 1)) for _ in range(count)]
    for first in range(0, count, LONG):
        found[draw.randrange(first, min(first + LONG, count))] = new
    return found


def prompt_ids(case: Case) -> Tensor:
    """All prompts, `[B, P]`."""
    shape, generator = (case["prompts"], case["prompt"]), torch.Generator().manual_seed(0)
    return torch.randint(300, 4000, shape, generator=generator)


def ours(task: Case, world: World) -> Answer:
    """The queue of one rank, through the engine, as PPO asks it; it takes `rows` prompts at once."""
    run = load_run(Path(task["config"]))
    engine = open_model(run, roles_of(run, "ppo")[0], world=world, total_steps=1)

    def answer(case: Case) -> list[list[int]]:
        ids = prompt_ids(case)
        numbers = torch.arange(len(ids)) + world.rank * len(ids)
        nothing = {"prompts": ("",) * len(ids), "columns": ({},) * len(ids)}
        prompts = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), numbers, **nothing)
        sampling = SamplingConfig(temperature=0.0 if case["draws"] == "greedy" else 1.0)
        decoding = Decoding(case["new"], [], pad_id=0, sampling=sampling, slots=case["rows"])
        _Limited.limits = torch.tensor([*limits(case), case["new"]])
        decoding_loop.Slots = Slots if case["lengths"] == "equal" else _Limited  # type: ignore[misc]
        found = generate_responses(engine, prompts, decoding=decoding, seed=0)
        responses = found.sequences[:, ids.shape[1] :].tolist()
        return [row[:limit] for row, limit in zip(responses, limits(case), strict=True)]

    return answer


class _Limited(Slots):
    """Rows end at limits of their own, as if they had drawn a stop token there."""

    limits: Tensor  # [B + 1]; the last is of slots without a row
    _seen: Step | None

    def step(self) -> Step | None:
        self._seen = super().step()
        return self._seen

    def accept(self, tokens: Tensor, ended: Tensor) -> None:
        assert self._seen is not None
        super().accept(tokens, ended | (self._seen.counts + 1 >= self.limits[self._seen.rows]))


class _Limits(StoppingCriteria):
    """The same for transformers."""

    def __init__(self, case: Case, first: int) -> None:
        self._limits, self._prompt = torch.tensor(limits(case)[first : first + case["rows"]]), case["prompt"]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        return input_ids.shape[1] - self._prompt >= self._limits


def theirs(task: Case, _: World, *, cache: str) -> Answer:
    """`generate` of transformers, which takes one batch of `rows` prompts after the other."""
    model = _model(task)
    # A default of its own is to draw from the 50 most likely tokens, which costs it more.
    words: dict[str, Any] = {"top_k": 0, "eos_token_id": None, "pad_token_id": 0, "disable_compile": True}
    words |= {} if cache == "dynamic" else {"cache_implementation": cache}

    def answer(case: Case) -> list[list[int]]:
        ids, found = prompt_ids(case), []
        for first in range(0, len(ids), case["rows"]):
            batch, criteria = ids[first : first + case["rows"]], StoppingCriteriaList([_Limits(case, first)])
            more = words | {"do_sample": case["draws"] == "sampled", "max_new_tokens": case["new"]}
            mask = torch.ones_like(batch)
            tokens = model.generate(input_ids=batch, attention_mask=mask, stopping_criteria=criteria, **more)
            found += tokens[:, ids.shape[1] :].tolist()
        return [row[:limit] for row, limit in zip(found, limits(case), strict=True)]

    return answer


def floor(task: Case, world: World) -> Answer:
    """The products of weights alone: of prompts, then of as few full steps of `rows` tokens as there can be."""
    model = _model(task)
    if model.dtype is torch.float32:
        multiply_with_onednn(model.config.hidden_size, world=world)
    *inner, head = [part.weight for part in model.modules() if isinstance(part, nn.Linear)]  # [out, in]
    assert head is model.get_output_embeddings().weight  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def answer(case: Case) -> list[list[int]]:
        rows, count = case["rows"], case["prompts"]
        steps = -(-(sum(limits(case)) - count) // rows)
        widths = {weight.shape[1] for weight in (*inner, head)}
        inputs = {width: torch.randn(rows * case["prompt"], width, dtype=model.dtype) for width in widths}
        for tokens in [rows * case["prompt"]] * (count // rows) + [rows] * steps:
            for weight in inner:
                F.linear(inputs[weight.shape[1]][:tokens], weight)
            F.linear(inputs[head.shape[1]][:rows], head)
        return []

    return answer


def _model(task: Case) -> PreTrainedModel:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[task["precision"]]
    return AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype).eval()


CONTENDERS: dict[str, Callable[[Case, World], Answer]] = {
    "floor": floor,
    "ours": ours,
    "ours, MKL": ours,
    "dynamic": partial(theirs, cache="dynamic"),
    "static": partial(theirs, cache="static"),
    "gathered": ours,
    "sharded": ours,
}


if __name__ == "__main__":
    main()
