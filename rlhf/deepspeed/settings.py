"""What a DeepSpeed configuration sets here: ZeRO, offload, precision, activations, AdamW, its schedule, clipping.

`read_engine` and `read_optimizer` collect settings in a `Reading`, each with the reason why it has its value.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, NamedTuple

from rlhf.config.engine_config import EngineConfig, GradDtype, MasterWeights, MomentDtype, OffloadDevice, Precision
from rlhf.config.stage_configs import OptimizerConfig, Schedule
from rlhf.deepspeed.arithmetic import SHAPES
from rlhf.deepspeed.keys import AUTO, TABLE, Path, asks, choice, integer, number, section, switch
from rlhf.deepspeed.reader import Document

_ZERO = "zero_optimization"
_OLD_SWITCHES = {"offload_optimizer": f"{_ZERO}.cpu_offload", "offload_param": f"{_ZERO}.cpu_offload_param"}
"""The offload blocks, and the switches that were there before them."""
_ENABLED = ("fp16.enabled", "bf16.enabled")
SCHEDULES = {shape.__name__: Schedule(kind) for kind, shape in SHAPES.items()}
"""The schedule by its name in DeepSpeed."""
_TORCH_WEIGHT_DECAY = 0.01


class Origin(StrEnum):
    """Why a setting has its value, as a text about the key."""

    file = "{}"
    auto = "{} is auto: the run's own"
    default = "DeepSpeed's default of {}"


class Setting(NamedTuple):
    """What a configuration sets a setting to."""

    value: Any
    origin: Origin
    place: str
    """File, line and key."""


@dataclass(frozen=True)
class Reading:
    """A configuration under present names, and the settings that have been read from it so far."""

    document: Document
    settings: dict[str, Setting] = field(default_factory=dict)
    """By dotted name, which begins with `engine` or `optimizer`."""
    warnings: list[str] = field(default_factory=list)
    decided: set[Path] = field(default_factory=set)
    """Keys that a setting comes from."""

    def section(self, dotted: str) -> dict[str, Any]:
        """The content of a section; empty where it is not there."""
        value: Any = self.document.content
        path = _path(dotted)
        for depth, name in enumerate(path, start=1):
            value = section(value.get(name), where=self.document.where(path[:depth]))
        return dict(value)

    def raw(self, dotted: str) -> Any:
        """The value of a key as it is written, None where it is not there."""
        parent, _, name = dotted.rpartition(".")
        return self.section(parent).get(name)

    def has(self, dotted: str) -> bool:
        """Whether a key or section says anything: it is neither missing nor null nor auto."""
        return self.raw(dotted) not in (None, AUTO)

    def value(self, dotted: str) -> Any:
        """The value of a key by the kind in the table; None where it is not there or auto."""
        raw, key = self.raw(dotted), TABLE.find(_path(dotted))
        assert key is not None, dotted
        return None if raw in (None, AUTO) else key.read(raw, where=self.where(dotted))

    def where(self, dotted: str) -> str:
        """Where a key is written, for messages."""
        return self.document.where(_path(dotted))

    def sets(
        self, setting: str, value: Any, *, key: str, also: Iterable[str] = (), origin: Origin = Origin.file
    ) -> None:
        """Note that `key`, and the keys of `also` as far as they are there, decide a setting by its dotted name."""
        paths = [_path(dotted) for dotted in (key, *also)]
        self.decided.update(paths if origin is not Origin.default else [])
        written = dict.fromkeys(place for path in paths for place in self.document.written_at(path))
        first = self.where(key)
        others = [".".join(place) for place in written if place in self.document.written]
        place = ", ".join([first, *(other for other in others if not first.endswith(f": {other}"))])
        self.settings[setting] = Setting(value, origin, place)


def _path(dotted: str) -> Path:
    return tuple(dotted.split(".")) if dotted else ()


def read_engine(reading: Reading, own: EngineConfig) -> None:
    """Collect the settings of the engine; `own` is the run's, for what is auto.

    Raises:
        ValueError: a value of the wrong type, or settings that exclude each other.
    """
    _copy(reading, own, sections=("zero_optimization.",))
    if reading.has(_ZERO):
        _read_stage(reading, own)
    if reading.has("fp16") or reading.has("bf16"):
        _read_precision(reading, own)
    if reading.value("torch_autocast.enabled"):
        _read_autocast(reading)
    _read_gradient_types(reading, own)
    names = ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization", "number_checkpoints")
    asked = [path for name in names if reading.value(path := f"activation_checkpointing.{name}")]
    if asked:
        reading.sets("engine.activation_checkpointing", True, key=asked[0], also=asked)
    if "activation_checkpointing.cpu_checkpointing" in asked:
        reading.sets("engine.activation_offload", True, key="activation_checkpointing.cpu_checkpointing")


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
    raw = reading.raw(path := f"{_ZERO}.stage")
    stage = own.zero_stage if raw == AUTO else reading.value(path) or 0
    if stage not in range(4):
        raise ValueError(f"{reading.where(path)}={raw!r}: expected 0, 1, 2 or 3.")
    if raw is None:
        reading.sets("engine.zero_stage", 0, key=path, origin=Origin.default)
    _read_device(reading, "offload_optimizer", least=1, stage=stage)
    _read_device(reading, "offload_param", least=3, stage=stage)
    _read_blocks(reading)
    if (ranks := reading.value(path := f"{_ZERO}.mics_shard_size")) is not None and stage == 3:
        reading.sets("engine.shard_ranks", max(ranks, 0), key=path)
    limit = reading.value(path := f"{_ZERO}.stage3_model_persistence_threshold")
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
            found, old = f"{block} is there too, with device={raw or 'none'}", key.rpartition(".")[2]
            raise ValueError(f"{reading.where(key)}=true: {found}; remove {old}.")
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
    blocks = [f"{_ZERO}.{block}" for block in _OLD_SWITCHES]
    on_disk = [block for block in blocks if reading.raw(f"{block}.device") == "nvme"]
    for name, users in (("nvme_path", on_disk), ("buffer_count", on_disk), ("pin_memory", blocks)):
        values = {path: reading.value(path) for block in users if reading.has(path := f"{block}.{name}")}
        # The optimizer's folder, or the larger number: memory is pinned where one block says so.
        path = next(iter(values), "") if name == "nvme_path" else max(values, key=values.__getitem__, default="")
        if path and (values[path] or name != "buffer_count"):  # a buffer_count of 0 says nothing
            reading.sets(f"engine.{name}", values[path], key=path, also=values)
        if name == "nvme_path" and len(set(values.values())) > 1:
            reading.warnings.append(f"nvme_path differs between the two blocks; all goes to {values[path]}")


# Precision.


def _read_autocast(reading: Reading) -> None:
    """Autocast may be to bf16, in which whole blocks compute here, with fp32 masters as in DeepSpeed."""
    key, dtype = "torch_autocast.enabled", reading.value("torch_autocast.dtype")
    if dtype not in ("bf16", "bfloat16", "torch.bfloat16") or reading.value("fp16.enabled"):
        raise ValueError(
            f"{reading.where(key)}=true, with dtype={dtype}: expected dtype=bfloat16, and fp16 off. For another "
            f"precision switch on bf16 or fp16 instead, and this off."
        )
    reading.sets("engine.precision", Precision.bf16, key=key, also=("torch_autocast.dtype", *_ENABLED))


def _read_precision(reading: Reading, own: EngineConfig) -> None:
    own_says = {"fp16": own.precision == Precision.fp16, "bf16": own.precision in (Precision.bf16, Precision.auto)}
    autos = [half for half in own_says if reading.raw(f"{half}.enabled") == AUTO]
    on = [half for half in own_says if (own_says[half] if half in autos else reading.value(f"{half}.enabled"))]
    if len(on) == 2 and not autos:
        raise ValueError(f"{reading.where('fp16.enabled')}=true and bf16.enabled=true: expected one of them.")
    on = [half for half in on if len(on) == 1 or half not in autos]  # auto gives way
    is_silent = autos == ["fp16"] and not reading.has("bf16")  # fp16 is auto, and nothing is said about bf16
    if on and on[0] not in autos:
        reading.sets("engine.precision", Precision(on[0]), key=f"{on[0]}.enabled", also=_ENABLED)
    elif on or is_silent or (autos and own.precision == Precision.fp32):
        key = f"{(on or autos)[0]}.enabled"
        reading.sets("engine.precision", own.precision, key=key, also=_ENABLED, origin=Origin.auto)
    else:
        half = next(name for name in own_says if reading.has(name))
        reading.sets("engine.precision", Precision.fp32, key=f"{half}.enabled", also=_ENABLED)
    if on == ["fp16"]:
        _copy(reading, own, sections=("fp16.",))
        written = reading.section("fp16")
        for row in TABLE:
            if row.path.startswith("fp16.") and row.setting and row.path.removeprefix("fp16.") not in written:
                reading.sets(row.setting, row.default, key=row.path, origin=Origin.default)
    elif on == ["bf16"]:
        _read_bf16_state(reading)


def _read_bf16_state(reading: Reading) -> None:
    """Two bytes for each moment, and for masters and gradients."""
    if reading.value(key := "bf16.bf16_optimizer_states"):
        reading.sets("engine.moments", MomentDtype.bf16, key=key)
    if reading.value(key := "bf16.bf16_master_weights_and_grads"):
        reading.sets("engine.master_weights", MasterWeights.split, key=key)
        reading.sets("engine.grad_accum_dtype", GradDtype.bf16, key=key)


def _read_gradient_types(reading: Reading, own: EngineConfig) -> None:
    """bf16 where the file says so, for sums of micro-batches only beside bf16 weights; everything else is fp32."""
    known = reading.settings.get("engine.precision")
    is_narrow = (known.value if known else own.precision) in (Precision.bf16, Precision.auto)
    sums, sent = ("data_types.grad_accum_dtype", "grad_accum_dtype"), ("communication_data_type", "reduce_dtype")
    for (key, name), may_be_bf16 in ((sums, is_narrow), (sent, True)):
        if (dtype := reading.value(key)) is None:
            continue
        is_bf16 = may_be_bf16 and "bf" in dtype
        if not is_bf16 and "32" not in dtype and dtype != "float":
            reading.warnings.append(f"{reading.where(key)}={dtype}: engine.{name} stays fp32, which is more exact")
        reading.sets(f"engine.{name}", GradDtype.bf16 if is_bf16 else GradDtype.fp32, key=key)


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
    if not isinstance(kind, str) or kind not in SCHEDULES:
        raise ValueError(
            f"{reading.where('scheduler.type')}={kind!r}: expected one of {', '.join(SCHEDULES)}. For another shape "
            f"leave the section out and set optimizer.schedule."
        )
    shape = {field.name: str(field.type) for field in fields(SHAPES[SCHEDULES[kind]]) if field.name != "lr"}
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
    reading.sets("optimizer.schedule", SCHEDULES[kind], key="scheduler.type")
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
            reading.warnings.append(f"{where}={raw!r}: neither log nor linear; DeepSpeed takes log, as this run does")
        return {name: raw if raw == "linear" else "log"}
    if annotation.startswith("bool"):
        return {name: switch(raw, where=where)}
    return {name: integer(raw, where=where) if annotation.startswith("int") else number(raw, where=where)}
