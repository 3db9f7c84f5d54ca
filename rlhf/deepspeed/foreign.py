"""Configurations of something else, which are refused by name: of trainers, and whatever has no key of DeepSpeed.

Many of them would otherwise pass: DeepSpeed takes no notice of a key at the top level that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rlhf.deepspeed.hjson import Document
from rlhf.deepspeed.key_table import TABLE
from rlhf.deepspeed.values import AUTO

COMMENTS = ("_", "comment", "//", "#")
"""How keys begin that stand for comments."""
_TRAINERS = {
    "LLaMA-Factory": {"finetuning_type", "dataset_dir", "cutoff_len"},
    "Axolotl": {"base_model", "sequence_len", "val_set_size"},
    "a Hugging Face trainer (TrainingArguments, or a TRL script's)": {
        *("output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate", "deepspeed"),
        *("num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "model_name_or_path"),
        *("save_strategy", "save_steps", "eval_strategy", "evaluation_strategy", "logging_steps", "report_to"),
        *("do_train", "gradient_checkpointing", "dataset_name", "overwrite_output_dir"),
    },
}
_SHARED = {
    *("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "fp16", "bf16", "optimizer", "scheduler"),
    *("dataloader_drop_last", "log_level", "wandb", "tensorboard", "checkpoint", "compile"),
}
"""Keys at the top level that DeepSpeed shares with others, where it wants an object or another meaning."""
_ELSE = "Give the DeepSpeed file that belongs to it, or choose the engine here, as in engine=zero2 or engine=zero3."
_MANY = 5


def refuse_foreign(document: Document) -> None:
    """Pass over a configuration that can be DeepSpeed's.

    Raises:
        ValueError: it is not, with what it looks like and what to give instead.
    """
    content = {name: value for name, value in document.content.items() if not name.startswith(COMMENTS)}
    if not content or any(_is_deepspeeds(name, value) for name, value in content.items()):
        return
    for trainer, names in _TRAINERS.items():
        marks = [name for name in content if name in names]
        if marks:
            raise ValueError(
                f"{document.name}: is a configuration of {trainer}, with {_some(marks)}, not one of DeepSpeed. "
                f"{_instead(content) or _ELSE}"
            )
    if not any(_is_known(name) for name in content):
        found = f"{document.name}: found {_some(map(_with_hint, content))} at the top level, none of which is a key of "
        expected = f"DeepSpeed; expected keys such as zero_optimization, bf16 or train_batch_size. {_instead(content)}"
        raise ValueError((found + expected).rstrip())


def _is_known(name: str) -> bool:
    return TABLE.find((name,)) is not None or TABLE.is_section((name,)) or name == "bfloat16"


def _is_deepspeeds(name: str, value: Any) -> bool:
    """Whether a key at the top level is there for DeepSpeed and for nothing else."""
    path = TABLE.canonical(("bf16" if name == "bfloat16" else name,))
    if TABLE.is_section(path) and isinstance(value, Mapping):
        return any(TABLE.above((*path, str(child))) or TABLE.is_section((*path, str(child))) for child in value)
    return _is_known(path[0]) and name not in _SHARED


def _instead(content: Mapping[str, Any]) -> str:
    inside = _inside(content)
    if inside:
        return f"What stands in its {inside!r} is one: give that alone."
    named = content.get("deepspeed")
    if isinstance(named, str) and named not in ("", "none", AUTO):
        return f"Its 'deepspeed' names the file to give instead: engine.deepspeed={named}."
    return ""


def _inside(content: Mapping[str, Any]) -> str:
    """The dotted name of the first section that could be DeepSpeed's; empty where there is none."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            if any(_is_deepspeeds(str(key), part) for key, part in value.items()):
                return name
            if inside := _inside(value):
                return f"{name}.{inside}"
    return ""


def _with_hint(name: str) -> str:
    if "." in name:
        return f"{name} (a dot does not nest)"
    near = TABLE.near((name,))
    return f"{name} (did you mean {' or '.join(near)}?)" if near else name


def _some(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:_MANY]) + (f" and {len(found) - _MANY} more" if len(found) > _MANY else "")
