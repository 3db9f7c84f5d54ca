"""What a DeepSpeed configuration says about the optimizer: AdamW, its schedule, clipping."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rlhf.config.optimizer_config import OptimizerConfig, Schedule
from rlhf.deepspeed.deepspeed_schedules import SHAPES
from rlhf.deepspeed.engine_keys import read_plain
from rlhf.deepspeed.key_table import TABLE
from rlhf.deepspeed.reading import Origin, Reading
from rlhf.deepspeed.values import AUTO, asks, integer, number, switch

_SCHEDULES = {
    "WarmupLR": Schedule.warmup_lr,
    "WarmupDecayLR": Schedule.warmup_decay_lr,
    "WarmupCosineLR": Schedule.warmup_cosine_lr,
    "OneCycle": Schedule.one_cycle,
    "LRRangeTest": Schedule.lr_range_test,
}
_FROM_THE_RUN = ("warmup_num_steps", "total_num_steps")
_TORCH_WEIGHT_DECAY = 0.01


def read_training(reading: Reading, own: OptimizerConfig) -> None:
    """Collect the settings of the optimizer.

    Args:
        reading: the configuration; settings are noted in it.
        own: the run's own optimizer, for what is `auto`.

    Raises:
        ValueError: a value of the wrong type, or one that cannot be honoured.
    """
    if reading.raw("gradient_clipping") == AUTO:
        reading.sets("optimizer.max_grad_norm", own.max_grad_norm, key="gradient_clipping", origin=Origin.auto)
    elif (norm := reading.value("gradient_clipping")) is not None:
        reading.sets("optimizer.max_grad_norm", norm, key="gradient_clipping")
    if reading.raw("optimizer.type") is not None:
        _read_adam(reading, own)
    elif reading.raw("optimizer") is not None:
        reading.warnings.append(
            f"{reading.where('optimizer')}: has no type; DeepSpeed ignores it, and so does this run"
        )
    if reading.raw("scheduler.type") not in (None, AUTO):
        _read_schedule(reading)
    elif reading.raw("scheduler") is not None:
        reading.warnings.append(
            f"{reading.where('scheduler')}: has no type; DeepSpeed ignores it, and so does this run"
        )


def is_decoupled(reading: Reading) -> bool:
    """Whether weight decay is AdamW's: the type AdamW says so whatever adam_w_mode says, as in DeepSpeed."""
    mode = reading.raw("optimizer.params.adam_w_mode")
    return str(reading.raw("optimizer.type")).lower() == "adamw" or mode in (None, AUTO) or asks(mode)


def is_adamw(reading: Reading, own: OptimizerConfig | None) -> bool:
    """Whether the numbers are AdamW's, also because there is no weight decay that could be a penalty instead."""
    raw = reading.raw("optimizer.params.weight_decay")
    decay = own.weight_decay if raw == AUTO and own is not None else reading.value("optimizer.params.weight_decay")
    return is_decoupled(reading) or not decay


def _read_adam(reading: Reading, own: OptimizerConfig) -> None:
    if reading.raw("optimizer.params") == AUTO:
        return
    given = reading.section("optimizer.params")
    read_plain(reading, own, sections=("optimizer.params",))
    _read_betas(reading, own)
    defaults: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    if asks(reading.raw("optimizer.params.torch_adam")) and is_decoupled(reading):
        defaults["weight_decay"] = _TORCH_WEIGHT_DECAY
    for name, value in defaults.items():
        if name not in given:
            reading.sets(f"optimizer.{name}", value, key=f"optimizer.params.{name}", origin=Origin.default)


def _read_betas(reading: Reading, own: OptimizerConfig) -> None:
    path = "optimizer.params.betas"
    raw, where = reading.raw(path), reading.where(path)
    if raw == AUTO:
        reading.sets("optimizer.betas", own.betas, key=path, origin=Origin.auto)
    elif raw is not None:
        if not isinstance(raw, list | tuple) or len(raw) != 2:
            raise ValueError(f"{where}={raw!r}: expected a list of two numbers.")
        reading.sets("optimizer.betas", [number(beta, where=where) for beta in raw], key=path)


def _read_schedule(reading: Reading) -> None:
    kind = reading.raw("scheduler.type")
    if not isinstance(kind, str) or kind not in _SCHEDULES:
        raise ValueError(
            f"{reading.where('scheduler.type')}={kind!r}: expected one of {', '.join(_SCHEDULES)}. For another shape "
            f"leave the section out and set optimizer.schedule."
        )
    schedule = _SCHEDULES[kind]
    shape = {field.name: field for field in fields(SHAPES[schedule]) if field.name != "lr"}
    options = {}
    for name in reading.section("scheduler.params"):
        path = f"scheduler.params.{name}"
        if (
            name not in shape
            and TABLE.find(("scheduler", "params", name)) is not None
            and name != "last_batch_iteration"
        ):
            raise ValueError(f"{reading.where(path)}: {kind} has no such parameter; it has {', '.join(shape)}.")
        if name in shape:
            options |= _option(reading, name, kind=str(shape[name].type))
    says_nothing = reading.raw("scheduler.params") != AUTO and reading.raw("scheduler.params.warmup_num_steps") is None
    if "warmup_num_steps" in shape and says_nothing:
        options["warmup_num_steps"] = 1000
    reading.sets("optimizer.schedule", schedule, key="scheduler.type")
    params = [f"scheduler.params.{name}" for name in options]
    reading.sets("optimizer.schedule_options", options, key="scheduler.params", also=params)


def _option(reading: Reading, name: str, *, kind: str) -> dict[str, Any]:
    """A parameter of a schedule, unless the run itself says it."""
    path = f"scheduler.params.{name}"
    raw, where = reading.raw(path), reading.where(path)
    if isinstance(raw, list) and len(raw) == 1:
        raw = raw[0]
    if isinstance(raw, list):
        raise ValueError(f"{where}={raw!r}: expected one number for all parameters.")
    if raw == AUTO:
        return {"warmup_max_lr": None} if name == "warmup_max_lr" else {}
    if raw is None:
        return {name: None} if "None" in kind else {}
    if name == "warmup_type":
        if raw not in ("log", "linear"):
            reading.warnings.append(
                f"{where}={raw!r}: is neither log nor linear; DeepSpeed takes log, as this run does"
            )
        return {name: raw if raw == "linear" else "log"}
    if kind.startswith("bool"):
        return {name: switch(raw, where=where)}
    return {name: integer(raw, where=where) if kind.startswith("int") else number(raw, where=where)}
