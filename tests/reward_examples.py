"""Reward functions of every kind, as users write them for TRL's GRPOTrainer, and some that fail."""

import asyncio
import functools
import re
import sys
import time

import numpy as np
import torch


def length(completions, **kwargs):
    """Longer is better: one of text, one of messages."""
    return [float(len(item if isinstance(item, str) else item[0]["content"])) for item in completions]


def tokens(completion_ids, **kwargs):
    return [len(ids) for ids in completion_ids]


def format_of_reasoning(completions):
    """1 where the reply has the form <think>...</think>..., by a regular expression; names nothing but completions."""
    return [bool(re.fullmatch(r"<think>.*?</think>.+", reply[0]["content"], re.DOTALL)) for reply in completions]


def accuracy(prompts, completions, ground_truth, **kwargs):
    """The text in \\boxed{} is the ground truth."""
    found = [re.search(r"\\boxed\{(.*?)\}", reply) for reply in completions]
    return [float(bool(match) and match[1] == truth) for match, truth in zip(found, ground_truth, strict=True)]


def math_only(prompts, completions, task, **kwargs):
    """One task of several: None says that it does not apply to the others."""
    return [float("4" in reply) if kind == "math" else None for reply, kind in zip(completions, task, strict=True)]


async def asked_elsewhere(prompts, completions, ground_truth, **kwargs):
    await asyncio.sleep(0.01)
    return [float(truth in reply) for reply, truth in zip(completions, ground_truth, strict=True)]


MEETING = []


async def first_to_meet(completions, **kwargs):
    """Waits for the other one: an end only if both wait at the same time, on the same loop every time."""
    MEETING.append(asyncio.get_running_loop())
    while len(MEETING) % 2:
        await asyncio.sleep(0.001)
    return [0.0] * len(completions)


second_to_meet = first_to_meet


def optional(completions, bonus=None, log_metric=None):
    return [0.0 if bonus is None or value is None else float(value) for value in bonus or completions]


def progress(completions, trainer_state):
    return [trainer_state.global_step / trainer_state.max_steps for _ in completions]


def array(completions, **kwargs):
    return torch.arange(len(completions))


class Scorer:
    """An object that is called, as those of some libraries are."""

    async def __call__(self, completions, **kwargs):
        return [1.0 for _ in completions]


scorer = Scorer()


def weighed(completions, weight):
    return [weight] * len(completions)


async def weighed_later(completions, weight=1.0):
    await asyncio.sleep(0)
    return [weight] * len(completions)


def unchanged(function):
    """A decorator as users write them: a plain function, whatever is inside."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


part = functools.partial(weighed, weight=1.0)
wrapped = unchanged(part)
part_of_async = functools.partial(weighed_later, weight=1.0)
wrapper_of_async = unchanged(weighed_later)
part_of_object = functools.partial(scorer)


def of_numpy(completions, **kwargs):
    return np.array([True, False, True])


def numpy_scalars(completions, **kwargs):
    return [np.bool_(True), np.float16(0), np.int64(1)]


def torch_scalars(completions, **kwargs):
    return [torch.tensor(1), torch.tensor([0.0]), torch.tensor(True)]


def booleans(completions, **kwargs):
    return (True, False, True)


def yielded(completions, **kwargs):
    yield from (1.0, 0, True)


def column(completions, **kwargs):
    return torch.tensor([[1.0], [0.0], [1.0]])


def changes_its_arguments(prompts, completions, completion_ids, steps, trainer_state, **kwargs):
    prompts[0][0]["content"] = "goodbye"
    prompts[0].append({"role": "user", "content": "?"})
    steps[0].append(steps[0][1]["b"].append(2))
    completions[0][0]["content"] = "changed"
    completion_ids[0].clear()
    trainer_state.global_step += 1
    prompts.pop()
    kwargs.clear()
    return [float(len(steps[0]) + trainer_state.global_step)] * 2


def logs(completions, log_metric, log_extra=None, **kwargs):
    log_metric("longest", max(len(text) for text in completions))
    log_metric(name="calls", value=np.float32(1))
    log_extra("shown", completions)
    return [0.0] * len(completions)


def logs_on_b(completions, **kwargs):
    if "b" in completions:
        kwargs["log_metric"]("found", 7)
    return [0.0] * len(completions)


def raises_on_rome(completions, **kwargs):
    if "Rome" in completions:
        raise ValueError("no Rome")
    return [1.0] * len(completions)


def raises_on_two(completions, **kwargs):
    if len(completions) > 1:
        raise ValueError("too many")
    return [1.0]


def exits(completions, **kwargs):
    sys.exit(0)


def exits_on_b(completions, **kwargs):
    if "b" in completions:
        sys.exit(0)
    return [1.0] * len(completions)


async def exits_later(completions, **kwargs):
    sys.exit(0)


async def cancels_itself(completions, **kwargs):
    raise asyncio.CancelledError


def endless_error(completions, **kwargs):
    raise ValueError("x" * 10_000)


def a_set(completions, **kwargs):
    return {1.0}


def too_few_yielded(completions, **kwargs):
    yield 1.0


def hangs_on_rome(completions, **kwargs):
    if "Rome" in completions:
        time.sleep(60)
    return [1.0] * len(completions)


async def waits_on_rome(completions, **kwargs):
    if "Rome" in completions:
        await asyncio.sleep(60)
    return [1.0] * len(completions)


async def blocks_on_rome(completions, **kwargs):
    if "Rome" in completions:
        time.sleep(60)  # noqa: ASYNC251 - what it should not do
    return [1.0] * len(completions)


def raises(completions, **kwargs):
    raise KeyError("answer")


def raises_on_b(completions, **kwargs):
    if "b" in completions:
        raise ValueError("no b")
    return [1.0] * len(completions)


async def raises_later(completions, **kwargs):
    await asyncio.sleep(0)
    raise ConnectionError("refused")


def too_few(completions, **kwargs):
    return [1.0]


def one_number(completions, **kwargs):
    return 1.0


def words(completions, **kwargs):
    return ["good" for _ in completions]


def not_a_number(completions, **kwargs):
    return [1.0, float("nan"), 2.0][: len(completions)]


def huge(completions, **kwargs):
    return [1e39] * len(completions)


def hangs(completions, **kwargs):
    while True:
        try:
            time.sleep(60)
        except Exception:  # noqa: BLE001 - as users write it
            return [0.0] * len(completions)


async def hangs_politely(completions, **kwargs):
    await asyncio.sleep(60)


async def hangs_the_loop(completions, **kwargs):
    time.sleep(60)  # noqa: ASYNC251 - what it should not do


def by_place(completions, /):
    return [0.0]


def needs_prompt(prompt, completions):
    return [0.0]


def needs_environments(completions, environments):
    return [0.0]


not_callable = 3
