"""Hugging Face Accelerate's configurations: what they say of DeepSpeed, as its DeepSpeedPlugin fills it in.

Those for FSDP and others are refused by name. Left out: what is said to Accelerate's launcher, which is ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from rlhf.deepspeed.hjson import Document, Path, leaves
from rlhf.deepspeed.values import AUTO, choice, integer, section, switch

_PART = "deepspeed_config"
_FILE = "deepspeed_config_file"
_MARKS = ("compute_environment", "distributed_type", "main_training_function", _PART)
_ZERO = "zero_optimization"
PLUGIN: dict[str, Path] = {
    "zero_stage": (_ZERO, "stage"),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "gradient_clipping": ("gradient_clipping",),
    "offload_optimizer_device": (_ZERO, "offload_optimizer", "device"),
    "offload_optimizer_nvme_path": (_ZERO, "offload_optimizer", "nvme_path"),
    "offload_param_device": (_ZERO, "offload_param", "device"),
    "offload_param_nvme_path": (_ZERO, "offload_param", "nvme_path"),
    "zero3_save_16bit_model": (_ZERO, "stage3_gather_16bit_weights_on_model_save"),
}
"""Of `deepspeed_config`: the key of DeepSpeed that each is."""
_DEFAULT_STAGE = 2
_LAUNCHER = "of Accelerate's launcher: here launch.ranks, or torchrun, starts the processes"
_PLUGIN_IGNORED = {
    "zero3_init_flag": "each rank reads only its own share of the weights in any case",
    "deepspeed_moe_layer_cls_names": "a whole block, with all its experts, is the unit that is gathered",
    **dict.fromkeys(
        (
            "deepspeed_multinode_launcher",
            "deepspeed_hostfile",
            "deepspeed_exclusion_filter",
            "deepspeed_inclusion_filter",
        ),
        _LAUNCHER,
    ),
}
_TPU, _OTHER_TYPE = "of TPUs", "of another distributed_type"
_IGNORED = {
    "distributed_type": "says that the file is for DeepSpeed",
    **dict.fromkeys(
        (
            *("compute_environment", "num_processes", "num_machines", "machine_rank", "main_process_ip", "gpu_ids"),
            *("main_process_port", "rdzv_backend", "same_network", "main_training_function", "enable_cpu_affinity"),
            *("mpirun_config", "command_file", "commands", "debug"),
        ),
        _LAUNCHER,
    ),
    "use_cpu": "the device is a GPU where there is one",
    **dict.fromkeys(("downcast_bf16", "tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm"), _TPU),
    **dict.fromkeys(("tpu_env", "tpu_metadata"), _TPU),
    **dict.fromkeys(("fsdp_config", "megatron_lm_config", "parallelism_config", "fp8_config"), _OTHER_TYPE),
    **dict.fromkeys(("dynamo_backend", "dynamo_config"), "there is no compiler in between"),
    "ipex_config": "Intel's extension is not used",
}
_SWITCHES = {
    *("debug", "enable_cpu_affinity", "same_network", "use_cpu", "downcast_bf16", "tpu_use_cluster", "tpu_use_sudo"),
    "zero3_init_flag",
}
_NUMBERS = {"num_processes", "num_machines", "machine_rank", "main_process_port"}
_PRECISIONS = ("no", "fp16", "bf16")
_INSTEAD = {
    "FSDP": "engine=zero3 shards as FSDP's FULL_SHARD does, engine=zero2 as SHARD_GRAD_OP; "
    "engine.offload_optimizer=cpu offloads",
    "NO": "engine=zero0 is one process, or several with launch.ranks",
    "MULTI_GPU": "engine=zero0 with launch.ranks=N keeps a whole copy on each GPU",
}


class Part(NamedTuple):
    """What a file of Accelerate says of DeepSpeed."""

    document: Document
    file: str | None
    """The DeepSpeed file that it names."""


def is_accelerates(content: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of Accelerate."""
    return any(name in content for name in _MARKS)


def deepspeed_part(document: Document) -> Part:
    """The configuration of DeepSpeed that one of Accelerate stands for.

    Raises:
        ValueError: it is not for DeepSpeed, or asks for what is not here.
    """
    content = document.content
    _require_deepspeed(document)
    given = section(content.get(_PART), where=document.where((_PART,)))
    file = given.get(_FILE)
    file = None if file in (None, "", "none") else str(file)
    new = replace(document, content={})
    for path in document.written:
        if path[0] != _PART:
            _take(path, document=document, new=new)
        elif len(path) > 1:
            _take_of_plugin(path, document=document, new=new)
    _set_precision(document, new)
    if file is None and given.get("zero_stage") is None:
        _put(new.content, PLUGIN["zero_stage"], value=_DEFAULT_STAGE)
        new.notes.append(f"{document.where((_PART,))}: has no zero_stage; it is {_DEFAULT_STAGE}, as in Accelerate")
    return Part(new, file)


def joined(outer: Document, inner: Document) -> Document:
    """The file that `deepspeed_config_file` names, with what Accelerate's own fills in.

    Raises:
        ValueError: the two contradict each other.
    """
    content = {name: dict(part) if isinstance(part, Mapping) else part for name, part in inner.content.items()}
    idle = dict(outer.idle)
    for path, value in leaves(outer.content).items():
        there = _get(content, path)
        if value in (None, AUTO) or str(there).lower() == str(value).lower():
            continue
        if there in (None, AUTO):
            _put(content, path, value=value)
        elif outer.content.get("fp16") == outer.content.get("bf16") == {"enabled": False} and path[-1] == "enabled":
            idle |= dict.fromkeys(outer.written_at(path), f"{inner.name} sets the precision")
        else:
            own = next(old for old, new in outer.became.items() if new == path or new[1:] == path[1:] == ("enabled",))
            raise ValueError(
                f"{outer.where(outer.became[own])}={outer.written[own]}: but {inner.where(path)}={there}; expected the "
                f"same. Remove the first, or write auto for the second."
            )
    return Document(
        inner.name,
        content,
        inner.lines | outer.lines,
        written=outer.written | inner.written,
        became=outer.became | inner.became,
        idle=idle | inner.idle,
        files=dict.fromkeys(outer.written, outer.name),
        notes=outer.notes + inner.notes,
    )


def _require_deepspeed(document: Document) -> None:
    raw = document.content.get("distributed_type", "DEEPSPEED")
    kind = "NO" if raw is False else str(raw).upper()  # NO without quotes is false in YAML
    if kind == "DEEPSPEED" and document.content.get("compute_environment") != "AMAZON_SAGEMAKER":
        return
    advice = _INSTEAD.get(
        kind, "choose the engine here, as in engine=zero2 or engine=zero3, and start with launch.ranks"
    )
    raise ValueError(
        f"{document.name}: is a configuration of Hugging Face Accelerate with distributed_type={kind}; expected one "
        f"for DEEPSPEED. Leave engine.deepspeed out: {advice}."
    )


def _take(path: Path, *, document: Document, new: Document) -> None:
    """A key at the top level."""
    _check(path, document)
    if path[0] in _IGNORED:
        new.idle[path] = _IGNORED[path[0]]
    elif path[0] not in ("mixed_precision", "fp16"):
        new.idle[path] = "neither Accelerate nor this run reads it"
        new.notes.append(f"{document.name}: neither Accelerate nor this run reads {'.'.join(path)}")


def _check(path: Path, document: Document) -> None:
    """Raises ValueError where the value of a key that is ignored cannot be meant."""
    value, where = document.written[path], document.where(path)
    if path[-1] in _SWITCHES and value is not None:
        switch(value, where=where)
    elif path[-1] in _NUMBERS and value is not None:
        integer(value, where=where, least=-1)  # num_processes is -1 where the command line says it


def _take_of_plugin(path: Path, *, document: Document, new: Document) -> None:
    name, value = path[1], document.written[path]
    _check(path, document)
    if name in _PLUGIN_IGNORED:
        new.idle[path] = _PLUGIN_IGNORED[name]
    elif name == _FILE:
        new.idle[path] = "none" if value in (None, "", "none") else "that file is read, with what stands here"
    elif name in PLUGIN:
        new.became[path] = PLUGIN[name]
        _put(new.content, PLUGIN[name], value=None if value == "none" and name.endswith("_path") else value)
    else:
        near = difflib.get_close_matches(name, [*PLUGIN, *_PLUGIN_IGNORED, _FILE], n=1, cutoff=0.6)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{document.where(path)}: there is no such key{hint}")


def _set_precision(document: Document, new: Document) -> None:
    """`mixed_precision`, or the `fp16` of old files; without either, the run's own stands."""
    path = ("mixed_precision",)
    value = document.content.get("mixed_precision")
    if value is None:
        path = ("fp16",)
        old = document.content.get("fp16")
        value = None if old is None else "fp16" if switch(old, where=document.where(path)) else "no"
    elif "fp16" in document.content:
        new.idle["fp16",] = "mixed_precision says it"
    if value is None:
        return
    word = "no" if value is False else str(value).lower()  # `no` without quotes is false in YAML
    if word == AUTO:
        new.idle[path] = "auto: the run's own"
        return
    choice(word, among=_PRECISIONS, where=document.where(path))
    for half in ("fp16", "bf16"):
        new.content[half] = {"enabled": word == half}
    new.became[path] = ("fp16" if word == "no" else word, "enabled")


def _get(content: Mapping[str, Any], path: Path) -> Any:
    value: Any = content
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _put(content: dict[str, Any], path: Path, *, value: Any) -> None:
    for name in path[:-1]:
        part = content.get(name)
        content[name] = dict(part) if isinstance(part, Mapping) else {}
        content = content[name]
    content[path[-1]] = value
