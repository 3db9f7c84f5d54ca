"""What a DeepSpeed configuration sets here: ZeRO, offload, precision, activations, AdamW, its schedule, clipping.

`read_engine` and `read_optimizer` collect settings in a `Reading`, each with the reason why it has its value.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

from rlhf.config.engine_config import EngineConfig, MomentDtype, OffloadDevice, Precision
from rlhf.config.optimizer_config import OptimizerConfig, Schedule
from rlhf.deepspeed.deepspeed_schedules import SHAPES
from rlhf.deepspeed.keys import TABLE
from rlhf.deepspeed.values import AUTO, Origin, Reading, asks, choice, integer, number, switch

_ZERO = "zero_optimization"
_OLD_SWITCHES = {"offload_optimizer": f"{_ZERO}.cpu_offload", "offload_param": f"{_ZERO}.cpu_offload_param"}
"""The offload blocks, and the switches that were there before them."""
_OLD_PIN = f"{_ZERO}.cpu_offload_use_pin_memory"
_HALVES = {
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), Precision.bf16),
    **dict.fromkeys(("fp16", "float16", "torch.float16", "half"), Precision.fp16),
}
_ENABLED = ("fp16.enabled", "bf16.enabled")
_CASTS_TO = "torch_autocast.dtype"
_SCHEDULES = {shape.__name__: Schedule(kind) for kind, shape in SHAPES.items()}
_TORCH_WEIGHT_DECAY = 0.01


def read_engine(reading: Reading, own: EngineConfig) -> None:
    """Collect the settings of the engine; `own` is the run's, for what is auto.

    Raises:
        ValueError: a value of the wrong type, or settings that exclude each other.
    """
    _copy(reading, own, sections=("zero_optimization.",))
    if reading.has(_ZERO):
        _read_stage(reading, own)
    _read_precision(reading, own)
    _read_activations(reading)


def read_optimizer(reading: Reading, own: OptimizerConfig) -> None:
    """Collect the settings of the optimizer; `own` is the run's, for what is auto.

    Raises:
        ValueError: a value of the wrong type, or one that cannot be honoured.
    """
    _copy(reading, own, sections=("gradient_clipping",))
    if reading.raw("optimizer.type") is not None and reading.raw("optimizer.params") != AUTO:
        _read_adamw(reading, own)
    if reading.has("scheduler.type"):
        _read_schedule(reading)
    for name in ("optimizer", "scheduler"):
        if reading.has(name) and reading.raw(f"{name}.type") is None:
            reading.warnings.append(f"{reading.where(name)}: has no type; DeepSpeed ignores it, and so does this run")


def is_adamw(reading: Reading, own: OptimizerConfig | None) -> bool:
    """Whether the numbers are AdamW's, also because there is no weight decay that could be a penalty instead."""
    raw = reading.raw("optimizer.params.weight_decay")
    decay = own.weight_decay if raw == AUTO and own is not None else reading.value("optimizer.params.weight_decay")
    return _is_decoupled(reading) or not decay


def _copy(reading: Reading, own: EngineConfig | OptimizerConfig, *, sections: tuple[str, ...]) -> None:
    """Collect every key whose value is a setting as it is, in sections given by how their keys begin."""
    for key in TABLE:
        if not key.setting or not key.path.startswith(sections):
            continue
        value = reading.value(key.path)
        if reading.raw(key.path) == AUTO:
            own_value = getattr(own, key.setting.partition(".")[2])
            reading.sets(key.setting, own_value, key=key.path, origin=Origin.auto)
        elif value == 0 and key.path.endswith("sub_group_size"):
            reading.warnings.append(f"{reading.where(key.path)}=0: the run's own tile size stands")
        elif value is not None:
            # DeepSpeed takes 0 here, and gathers what computes in any case.
            least = 1 if key.path.endswith("max_live_parameters") else value
            reading.sets(key.setting, max(value, least), key=key.path)


# ZeRO and offload.


def _read_stage(reading: Reading, own: EngineConfig) -> None:
    path = f"{_ZERO}.stage"
    raw = reading.raw(path)
    stage = own.zero_stage if raw == AUTO else reading.value(path) or 0
    if stage not in range(4):
        raise ValueError(f"{reading.where(path)}={raw!r}: expected 0, 1, 2 or 3.")
    if raw is None:
        reading.sets("engine.zero_stage", 0, key=path, origin=Origin.default)
    for block, least in zip(_OLD_SWITCHES, (1, 3), strict=True):
        _read_device(reading, block, least=least, stage=stage)
    _read_blocks(reading)
    path = f"{_ZERO}.stage3_model_persistence_threshold"
    limit = reading.value(path)
    if limit == 0:
        reading.sets("engine.persistence_threshold", 0, key=path)
    elif limit is not None and limit < sys.maxsize:
        reading.warnings.append(
            f"{reading.where(path)}={limit}: a limit on all of them together is not kept; lower "
            f"stage3_param_persistence_threshold instead"
        )


def _read_device(reading: Reading, block: str, *, least: int, stage: int) -> None:
    key = device_key = f"{_ZERO}.{block}.device"
    raw = AUTO if reading.raw(f"{_ZERO}.{block}") == AUTO else reading.raw(key)
    if reading.value(_OLD_SWITCHES[block]):
        key = _OLD_SWITCHES[block]
        if raw not in ("cpu", AUTO) and asks(reading.section(f"{_ZERO}.{block}")):
            old = key.rpartition(".")[2]
            raise ValueError(
                f"{reading.where(key)}=true: {block} is there too, with device={raw or 'none'}; remove {old}."
            )
        raw = "cpu"
    if raw == AUTO:
        return
    device = "none" if raw is None else choice(raw, among=tuple(OffloadDevice), where=reading.where(key))
    if device != "none" and stage < least:
        reading.warnings.append(f"{reading.where(key)}={device}: has no effect at ZeRO {stage}, as in DeepSpeed")
        device = "none"
    origin = Origin.default if raw is None else Origin.file
    reading.sets(f"engine.{block}", OffloadDevice(device), key=key, also=(device_key,), origin=origin)


def _read_blocks(reading: Reading) -> None:
    """One folder, one set of buffers and one way to lock memory serve both offload blocks."""
    blocks = {f"{_ZERO}.{block}": old for block, old in _OLD_SWITCHES.items()}
    on_disk = [block for block in blocks if reading.raw(f"{block}.device") == "nvme"]
    folders = {path: reading.value(path) for block in on_disk if reading.has(path := f"{block}.nvme_path")}
    if folders:
        path, folder = next(iter(folders.items()))
        reading.sets("engine.nvme_path", folder, key=path, also=folders)
        if len(set(folders.values())) > 1:
            reading.warnings.append(f"nvme_path differs between the two blocks; all goes to {folder}")
    in_use = [block for block, old in blocks.items() if reading.raw(block) is not None or reading.value(old)]
    pins = [f"{block}.pin_memory" for block in blocks]
    pins += [_OLD_PIN] if not all(reading.raw(f"{block}.pin_memory") is not None for block in in_use) else []
    for setting, paths in (("buffer_count", [f"{block}.buffer_count" for block in on_disk]), ("pin_memory", pins)):
        values = {path: reading.value(path) for path in paths if reading.has(path)}
        path = max(values, key=values.__getitem__, default="")
        if path and (setting == "pin_memory" or values[path]):  # a buffer_count of 0 says nothing
            reading.sets(f"engine.{setting}", values[path], key=path, also=values)


# Precision and activations.


def _read_precision(reading: Reading, own: EngineConfig) -> None:
    halves = {
        "fp16": _is_on(reading, "fp16", own_says=own.precision == Precision.fp16),
        "bf16": _is_on(reading, "bf16", own_says=own.precision in (Precision.bf16, Precision.auto)),
    }
    if all(halves.values()):
        if AUTO not in map(reading.raw, _ENABLED):
            raise ValueError(f"{reading.where('fp16.enabled')}=true and bf16.enabled=true: expected one of them.")
        halves["fp16" if reading.raw("fp16.enabled") == AUTO else "bf16"] = False
    casts_to = _autocast(reading, halves)
    if casts_to and not any(halves.values()):
        reading.sets("engine.precision", casts_to, key="torch_autocast.enabled", also=(_CASTS_TO, *_ENABLED))
    elif reading.has("fp16") or reading.has("bf16"):
        _set_precision(reading, own, halves=halves)
    if halves["fp16"] and "engine.precision" in reading.settings:
        _read_loss_scale(reading, own)
    if halves["bf16"] and reading.value("bf16.bf16_optimizer_states"):
        reading.sets("engine.moments", MomentDtype.bf16, key="bf16.bf16_optimizer_states")
    _check_parameters(reading)


def _is_on(reading: Reading, section: str, *, own_says: bool) -> bool:
    path = f"{section}.enabled"
    return own_says if reading.raw(path) == AUTO else bool(reading.value(path))


def _autocast(reading: Reading, halves: dict[str, bool]) -> Precision | None:
    """What `torch_autocast` computes in, if it is on; a half that is only `auto` gives way to it.

    Raises:
        ValueError: it is another precision than that of a half that the file switches on.
    """
    if not reading.value("torch_autocast.enabled"):
        return None
    raw = reading.raw(_CASTS_TO)
    word = None if raw in (None, AUTO) else choice(raw, among=tuple(_HALVES), where=reading.where(_CASTS_TO))
    for half, is_on in halves.items():
        if word is None or not is_on or _HALVES[word] == half:
            continue
        if reading.raw(f"{half}.enabled") != AUTO:
            raise ValueError(
                f"{reading.where(_CASTS_TO)}={raw}: but {half}.enabled=true; expected one precision. Make the former "
                f"{half} too, or switch one of the two off."
            )
        halves[half] = False
    return _HALVES[word or "bf16"]


def _set_precision(reading: Reading, own: EngineConfig, *, halves: dict[str, bool]) -> None:
    on = [half for half, is_on in halves.items() if is_on]
    autos = [half for half in halves if reading.raw(f"{half}.enabled") == AUTO]
    is_silent = autos == ["fp16"] and not reading.has("bf16")  # fp16 is auto, and nothing is said about bf16
    if on and on[0] not in autos:
        reading.sets("engine.precision", Precision(on[0]), key=f"{on[0]}.enabled", also=_ENABLED)
    elif on or is_silent or (autos and own.precision == Precision.fp32):
        key = f"{(on or autos)[0]}.enabled"
        reading.sets("engine.precision", own.precision, key=key, also=_ENABLED, origin=Origin.auto)
    else:
        half = next(name for name in halves if reading.has(name))
        reading.sets("engine.precision", Precision.fp32, key=f"{half}.enabled", also=_ENABLED)


def _read_loss_scale(reading: Reading, own: EngineConfig) -> None:
    _copy(reading, own, sections=("fp16.",))
    given = reading.section("fp16")
    for key in TABLE:
        if key.path.startswith("fp16.") and key.setting and key.path.partition(".")[2] not in given:
            reading.sets(key.setting, key.default, key=key.path, origin=Origin.default)


def _check_parameters(reading: Reading) -> None:
    """Raises ValueError where `data_types.param_dtype` is another precision than the rest of the file, as DeepSpeed."""
    path = "data_types.param_dtype"
    raw, setting = reading.raw(path), reading.settings.get("engine.precision")
    if raw in (None, AUTO) or setting is None or setting.value == Precision.auto:
        return
    if _HALVES.get(str(raw).lower(), Precision.fp32) != setting.value:
        raise ValueError(
            f"{reading.where(path)}={raw}: but {setting.value} by {setting.place}; expected the same. Remove the first."
        )


def _read_activations(reading: Reading) -> None:
    names = ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization", "number_checkpoints")
    asked = [path for name in names if reading.value(path := f"activation_checkpointing.{name}")]
    if asked:
        reading.sets("engine.activation_checkpointing", True, key=asked[0], also=asked)
    if "activation_checkpointing.cpu_checkpointing" in asked:
        reading.sets("engine.activation_offload", True, key="activation_checkpointing.cpu_checkpointing")


# AdamW and its schedule.


def _is_decoupled(reading: Reading) -> bool:
    """Whether weight decay is AdamW's: the type AdamW decides that whatever adam_w_mode says, as in DeepSpeed."""
    mode = reading.raw("optimizer.params.adam_w_mode")
    return str(reading.raw("optimizer.type")).lower() == "adamw" or mode in (None, AUTO) or asks(mode)


def _read_adamw(reading: Reading, own: OptimizerConfig) -> None:
    _copy(reading, own, sections=("optimizer.params.",))
    path = "optimizer.params.betas"
    raw, where = reading.raw(path), reading.where(path)
    if raw == AUTO:
        reading.sets("optimizer.betas", own.betas, key=path, origin=Origin.auto)
    elif raw is not None:
        if not isinstance(raw, list | tuple) or len(raw) != 2:
            raise ValueError(f"{where}={raw!r}: expected a list of two numbers.")
        reading.sets("optimizer.betas", [number(beta, where=where) for beta in raw], key=path)
    defaults: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    if asks(reading.raw("optimizer.params.torch_adam")) and _is_decoupled(reading):
        defaults["weight_decay"] = _TORCH_WEIGHT_DECAY
    for name, value in defaults.items():
        if name not in reading.section("optimizer.params"):
            reading.sets(f"optimizer.{name}", value, key=f"optimizer.params.{name}", origin=Origin.default)


def _read_schedule(reading: Reading) -> None:
    kind = reading.raw("scheduler.type")
    if not isinstance(kind, str) or kind not in _SCHEDULES:
        raise ValueError(
            f"{reading.where('scheduler.type')}={kind!r}: expected one of {', '.join(_SCHEDULES)}. For another shape "
            f"leave the section out and set optimizer.schedule."
        )
    shape = {field.name: str(field.type) for field in fields(SHAPES[_SCHEDULES[kind]]) if field.name != "lr"}
    options: dict[str, Any] = {}
    for name in reading.section("scheduler.params"):
        path = f"scheduler.params.{name}"
        if name in shape:
            options |= _option(reading, name, annotation=shape[name])
        elif TABLE.find(("scheduler", "params", name)) is not None and name != "last_batch_iteration":
            raise ValueError(f"{reading.where(path)}: {kind} has no such parameter; it has {', '.join(shape)}.")
    says_nothing = reading.raw("scheduler.params") != AUTO and reading.raw("scheduler.params.warmup_num_steps") is None
    if "warmup_num_steps" in shape and says_nothing:
        options["warmup_num_steps"] = 1000
    reading.sets("optimizer.schedule", _SCHEDULES[kind], key="scheduler.type")
    params = [f"scheduler.params.{name}" for name in options]
    reading.sets("optimizer.schedule_options", options, key="scheduler.params", also=params)


def _option(reading: Reading, name: str, *, annotation: str) -> dict[str, Any]:
    """A parameter of a schedule, read by the annotation of its field; empty where the run itself decides it."""
    path = f"scheduler.params.{name}"
    raw, where = reading.raw(path), reading.where(path)
    if isinstance(raw, list) and len(raw) == 1:
        raw = raw[0]
    if isinstance(raw, list):
        raise ValueError(f"{where}={raw!r}: expected one number for all parameters.")
    if raw == AUTO:
        return {"warmup_max_lr": None} if name == "warmup_max_lr" else {}
    if raw is None:
        return {name: None} if "None" in annotation else {}
    if name == "warmup_type":
        if raw not in ("log", "linear"):
            reading.warnings.append(
                f"{where}={raw!r}: is neither log nor linear; DeepSpeed takes log, as this run does"
            )
        return {name: raw if raw == "linear" else "log"}
    if annotation.startswith("bool"):
        return {name: switch(raw, where=where)}
    return {name: integer(raw, where=where) if annotation.startswith("int") else number(raw, where=where)}
