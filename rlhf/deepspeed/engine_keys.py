"""What a DeepSpeed configuration says about the engine: ZeRO, tiers, precision, activations."""

from __future__ import annotations

import sys
from typing import Any

from rlhf.config.engine_config import EngineConfig, Moments, OffloadDevice, Precision
from rlhf.deepspeed.key_table import TABLE
from rlhf.deepspeed.reading import Origin, Reading
from rlhf.deepspeed.values import AUTO, choice, integer, switch

_DEVICES = {"none": OffloadDevice.none, "cpu": OffloadDevice.cpu, "nvme": OffloadDevice.nvme}
_BLOCKS = {"offload_optimizer": "engine.offload_optimizer", "offload_param": "engine.offload_param"}
_HALVES = {
    "bf16": Precision.bf16,
    "bfloat16": Precision.bf16,
    "torch.bfloat16": Precision.bf16,
    "fp16": Precision.fp16,
    "float16": Precision.fp16,
    "torch.float16": Precision.fp16,
    "half": Precision.fp16,
}
_ENABLED = ("fp16.enabled", "bf16.enabled")
_CASTS_TO = "torch_autocast.dtype"
_RECOMPUTES = ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization")
_NOT_AS_THEY_ARE = {"sub_group_size": 1, "stage3_max_live_parameters": 1}
"""Keys that may be 0 in DeepSpeed, and the least they are here."""


def read_engine(reading: Reading, own: EngineConfig) -> None:
    """Collect the settings of the engine.

    Args:
        reading: the configuration; settings are noted in it.
        own: the run's own engine, for what is `auto`.

    Raises:
        ValueError: a value of the wrong type, or settings that exclude each other.
    """
    read_plain(reading, own, sections=("zero_optimization",))
    if reading.raw("zero_optimization") is not None:
        _read_stage(reading, own)
    _read_precision(reading, own)
    _read_activations(reading)


def read_plain(reading: Reading, own: Any, *, sections: tuple[str, ...]) -> None:
    """Collect every key of some sections whose value is a setting as it is."""
    group = "engine" if isinstance(own, EngineConfig) else "optimizer"
    for key in TABLE:
        if not key.setting or not key.path.startswith(tuple(f"{section}." for section in sections)):
            continue
        value, name = reading.value(key.path), key.path.rpartition(".")[2]
        if reading.raw(key.path) == AUTO:
            own_value = getattr(own, key.setting)
            reading.sets(f"{group}.{key.setting}", own_value, key=key.path, origin=Origin.auto)
        elif value == 0 and name == "sub_group_size":
            reading.warnings.append(f"{reading.where(key.path)}=0: the run's own tile size stands")
        elif value is not None:
            least = _NOT_AS_THEY_ARE.get(name, value)
            reading.sets(f"{group}.{key.setting}", max(value, least), key=key.path)


def _read_stage(reading: Reading, own: EngineConfig) -> None:
    path = "zero_optimization.stage"
    raw = reading.raw(path)
    stage = own.zero_stage if raw == AUTO else reading.value(path) or 0
    if stage not in range(4):
        raise ValueError(f"{reading.where(path)}={raw!r}: expected 0, 1, 2 or 3.")
    if raw is None:
        reading.sets("engine.zero_stage", 0, key=path, origin=Origin.default)
    for block, setting in _BLOCKS.items():
        _read_tier(reading, block, setting=setting, least=1 if block == "offload_optimizer" else 3, stage=stage)
    _read_buffers(reading)
    limit = reading.value("zero_optimization.stage3_model_persistence_threshold")
    if limit == 0:
        reading.sets("engine.persistence_threshold", 0, key="zero_optimization.stage3_model_persistence_threshold")
    elif limit is not None and limit < sys.maxsize:
        reading.warnings.append(
            f"{reading.where('zero_optimization.stage3_model_persistence_threshold')}={limit}: a limit on all of them "
            f"together is not kept; lower stage3_param_persistence_threshold instead"
        )


def _read_tier(reading: Reading, block: str, *, setting: str, least: int, stage: int) -> None:
    path = f"zero_optimization.{block}.device"
    raw = reading.raw(path)
    if raw == AUTO:
        return
    device = "none" if raw is None else choice(raw, among=tuple(_DEVICES), where=reading.where(path))
    if device != "none" and stage < least:
        reading.warnings.append(f"{reading.where(path)}={device}: has no effect at ZeRO {stage}, as in DeepSpeed")
        device = "none"
    origin = Origin.default if raw is None else Origin.file
    reading.sets(setting, _DEVICES[device], key=path, origin=origin)


def _read_buffers(reading: Reading) -> None:
    """One folder, one set of buffers and one way to lock memory serve both blocks."""
    blocks = [f"zero_optimization.{block}" for block in _BLOCKS]
    on_disk = [block for block in blocks if reading.raw(f"{block}.device") == "nvme"]
    folders = _given(reading, [f"{block}.nvme_path" for block in on_disk])
    for path, folder in folders.items():
        if not isinstance(folder, str):
            raise ValueError(f"{reading.where(path)}={folder!r}: expected the path of a folder on a local disk.")
    if folders:
        path, folder = next(iter(folders.items()))
        reading.sets("engine.nvme_path", folder, key=path, also=folders)
    if len(set(folders.values())) > 1:
        reading.warnings.append(f"nvme_path differs between the two blocks; all goes to {folder}")
    counts = {path: _whole(reading, path) or 0 for path in _given(reading, [f"{b}.buffer_count" for b in on_disk])}
    if any(counts.values()):
        path = max(counts, key=lambda path: counts[path])
        reading.sets("engine.buffer_count", counts[path], key=path, also=counts)
    pinned = _given(reading, [f"{block}.pin_memory" for block in blocks])
    said = {path: switch(value, where=reading.where(path)) for path, value in pinned.items()}
    if said:
        path = max(said, key=lambda path: said[path])
        reading.sets("engine.pin_memory", said[path], key=path, also=said)


def _given(reading: Reading, paths: list[str]) -> dict[str, Any]:
    """The raw values of those of some keys that have one."""
    values = {path: reading.raw(path) for path in paths}
    return {path: value for path, value in values.items() if value not in (None, AUTO)}


def _whole(reading: Reading, path: str) -> int | None:
    raw = reading.raw(path)
    return None if raw in (None, AUTO) else integer(raw, where=reading.where(path))


def _read_precision(reading: Reading, own: EngineConfig) -> None:
    halves = {
        "fp16": _half(reading, "fp16", own_says=own.precision == Precision.fp16),
        "bf16": _half(reading, "bf16", own_says=own.precision in (Precision.bf16, Precision.auto)),
    }
    if halves["fp16"] and halves["bf16"]:
        if AUTO not in (reading.raw("fp16.enabled"), reading.raw("bf16.enabled")):
            raise ValueError(f"{reading.where('fp16.enabled')}=true and bf16.enabled=true: expected one of them.")
        halves["fp16" if reading.raw("fp16.enabled") == AUTO else "bf16"] = False
    casts_to = _autocast(reading, halves)
    if casts_to and not any(halves.values()):
        reading.sets("engine.precision", casts_to, key="torch_autocast.enabled", also=(_CASTS_TO, *_ENABLED))
    elif reading.raw("fp16") is not None or reading.raw("bf16") is not None:
        _set_precision(reading, own, halves=halves)
    if reading.settings.get(("engine", "precision")) is not None and halves["fp16"]:
        _read_loss_scale(reading, own)
    if halves["bf16"] and reading.value("bf16.bf16_optimizer_states"):
        reading.sets("engine.moments", Moments.bf16, key="bf16.bf16_optimizer_states")
    _check_parameters(reading)


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


def _check_parameters(reading: Reading) -> None:
    """Raises ValueError where `data_types.param_dtype` is another precision than the rest of the file, as DeepSpeed."""
    path = "data_types.param_dtype"
    raw, setting = reading.raw(path), reading.settings.get(("engine", "precision"))
    if raw in (None, AUTO) or setting is None or setting.value == Precision.auto:
        return
    if _HALVES.get(str(raw).lower(), Precision.fp32) != setting.value:
        raise ValueError(
            f"{reading.where(path)}={raw}: but {setting.value} by {setting.place}; expected the same. Remove the first."
        )


def _half(reading: Reading, section: str, *, own_says: bool) -> bool:
    path = f"{section}.enabled"
    return own_says if reading.raw(path) == AUTO else bool(reading.value(path))


def _set_precision(reading: Reading, own: EngineConfig, *, halves: dict[str, bool]) -> None:
    on = [section for section, is_on in halves.items() if is_on]
    autos = [section for section in halves if reading.raw(f"{section}.enabled") == AUTO]
    if on and on[0] in autos:
        reading.sets("engine.precision", own.precision, key=f"{on[0]}.enabled", also=_ENABLED, origin=Origin.auto)
    elif on:
        reading.sets("engine.precision", Precision(on[0]), key=f"{on[0]}.enabled", also=_ENABLED)
    elif autos and own.precision is Precision.fp32:
        reading.sets("engine.precision", own.precision, key=f"{autos[0]}.enabled", also=_ENABLED, origin=Origin.auto)
    elif autos == ["fp16"] and reading.raw("bf16") is None and own.precision is not Precision.fp16:
        reading.sets("engine.precision", own.precision, key="fp16.enabled", origin=Origin.auto)
    else:
        section = next(name for name in halves if reading.raw(name) is not None)
        reading.sets("engine.precision", Precision.fp32, key=f"{section}.enabled", also=_ENABLED)


def _read_loss_scale(reading: Reading, own: EngineConfig) -> None:
    read_plain(reading, own, sections=("fp16",))
    given = reading.section("fp16")
    for key in TABLE:
        if key.path.startswith("fp16.") and key.setting and key.path.partition(".")[2] not in given:
            reading.sets(f"engine.{key.setting}", key.default, key=key.path, origin=Origin.default)


def _read_activations(reading: Reading) -> None:
    asked = [f"activation_checkpointing.{name}" for name in _RECOMPUTES]
    asked = [path for path in asked if reading.value(path)]
    count = "activation_checkpointing.number_checkpoints"
    asked += [count] if _whole(reading, count) else []
    if asked:
        reading.sets("engine.activation_checkpointing", True, key=asked[0], also=asked)
    if reading.value("activation_checkpointing.cpu_checkpointing"):
        reading.sets("engine.activation_offload", True, key="activation_checkpointing.cpu_checkpointing")
