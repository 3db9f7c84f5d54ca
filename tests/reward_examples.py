"""Reward functions of every kind, as users write them for TRL's GRPOTrainer, and some that fail."""

import asyncio
import re
import time

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


def needs_environments(completions, environments):
    return [0.0]


not_callable = 3
