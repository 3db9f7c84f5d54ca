"""The values that Transformers writes for `"auto"` in a DeepSpeed configuration, and those that it compares.

The rules are those of Transformers' `HfTrainerDeepSpeedConfig` and Accelerate's `DeepSpeedPlugin`, which need DeepSpeed
itself. The training arguments fill their part at once, the model's size and the number of steps when training starts.
A key that is not there is not filled. What differs from the training arguments is collected, and refused together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import TrainingArguments

AUTO = "auto"
_ZERO = "zero_optimization"
_BY_HIDDEN_SIZE = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
_PLUGIN: dict[str, tuple[str, Any]] = {
    "stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2),
    "offload_optimizer.device": ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
    "offload_param.device": ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none"),
    "offload_optimizer.nvme_path": ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH", None),
    "offload_param.nvme_path": ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH", None),
    "stage3_gather_16bit_weights_on_model_save": ("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", False),
}
"""Keys of `zero_optimization` that Accelerate fills from the environment, with its defaults."""


class AutoValues:
    """Fills a configuration in place."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.mismatches: list[str] = []
        """Lines of the error that `require_match` raises."""

    def fill_arguments(self, args: TrainingArguments) -> None:
        """What the training arguments decide."""
        micro, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
        betas = [args.adam_beta1, args.adam_beta2]
        fp16, bf16 = args.fp16 or args.fp16_full_eval, args.bf16 or args.bf16_full_eval
        self._match("train_micro_batch_size_per_gpu", micro, name="per_device_train_batch_size")
        self._match("gradient_accumulation_steps", steps, name="gradient_accumulation_steps")
        self._match("train_batch_size", args.world_size * micro * steps, name="train_batch_size (calculated)")
        self._match("gradient_clipping", args.max_grad_norm, name="max_grad_norm")
        self._match("optimizer.params.lr", args.learning_rate, name="learning_rate")
        self._match("optimizer.params.betas", betas, name="adam_beta1+adam_beta2")
        self._match("optimizer.params.eps", args.adam_epsilon, name="adam_epsilon")
        self._match("optimizer.params.weight_decay", args.weight_decay, name="weight_decay")
        self._fill("scheduler.params.warmup_min_lr", 0)
        self._match("scheduler.params.warmup_max_lr", args.learning_rate, name="learning_rate")
        if args.save_on_each_node:
            self.content["checkpoint"] = {**self.content.get("checkpoint", {}), "use_node_local_storage": True}
        self._match("fp16.enabled", fp16, name="fp16|fp16_full_eval")
        self._match("bf16.enabled", bf16, name="bf16|bf16_full_eval")

    def fill_hidden_size(self, model: nn.Module) -> None:
        """What the width of the model decides: sizes of buckets.

        Raises:
            ValueError: the model's configuration says no width.
        """
        keys = [f"{_ZERO}.{name}" for name in _BY_HIDDEN_SIZE if self._get(f"{_ZERO}.{name}") == AUTO]
        if not keys:
            return
        width = _hidden_size(getattr(model, "config", None))
        if width is None:
            raise ValueError(
                f"The model's configuration has neither hidden_size nor hidden_sizes, which {', '.join(keys)}=auto in "
                f"the DeepSpeed configuration need; write numbers there."
            )
        self._fill(f"{_ZERO}.reduce_bucket_size", width * width)
        if self._get(f"{_ZERO}.stage") == 3:
            self._fill(f"{_ZERO}.stage3_prefetch_bucket_size", int(0.9 * width * width))
            self._fill(f"{_ZERO}.stage3_param_persistence_threshold", 10 * width)

    def fill_steps(self, args: TrainingArguments, total: int) -> None:
        """What the number of optimizer steps decides: the schedule's length and warm-up."""
        warmup = max(1, args.get_warmup_steps(total))
        self._match("scheduler.params.total_num_steps", total, name="num_training_steps (calculated)")
        self._match("scheduler.params.warmup_num_steps", warmup, name="warmup_steps")

    def fill_environment(self, args: TrainingArguments) -> None:
        """What Accelerate decides besides: ZeRO and offload by the environment, and the precision that is not named.

        Raises:
            ValueError: there is no `zero_optimization`.
        """
        if not isinstance(self.content.get(_ZERO), Mapping):
            raise ValueError("the DeepSpeed configuration has no zero_optimization; expected one, with its stage.")
        for name, (variable, default) in _PLUGIN.items():
            value = os.environ.get(variable, default)
            self._fill(f"{_ZERO}.{name}", int(value) if name == "stage" else value)
        for half in ("fp16", "bf16"):
            self.content.setdefault(half, {"enabled": args.mixed_precision == half})

    def require_match(self) -> None:
        """Raise ValueError with everything that differs from the training arguments."""
        if self.mismatches:
            lines = "\n".join(self.mismatches)
            raise ValueError(
                "Please correct the following DeepSpeed config values that mismatch TrainingArguments values:\n"
                f"{lines}\nThe easiest method is to set these DeepSpeed config values to 'auto'."
            )

    def _node(self, dotted: str) -> tuple[dict[str, Any] | None, str]:
        *sections, key = dotted.split(".")
        node: Any = self.content
        for name in sections:
            node = node.get(name) if isinstance(node, dict) else None
        return (node if isinstance(node, dict) else None), key

    def _get(self, dotted: str) -> Any:
        node, key = self._node(dotted)
        return None if node is None else node.get(key)

    def _fill(self, dotted: str, value: Any) -> None:
        node, key = self._node(dotted)
        if node is not None and node.get(key) == AUTO:
            node[key] = value

    def _match(self, dotted: str, value: Any, *, name: str) -> None:
        """Fill the key, or note that its value is not that of the training argument `name`."""
        self._fill(dotted, value)
        found = self._get(dotted)
        if found is not None and found != value:
            self.mismatches.append(f"- ds {dotted}={found} vs hf {name}={value}")


def _hidden_size(config: Any) -> int | None:
    parts = [part for part in (config, getattr(config, "text_config", None)) if part is not None]
    for part in parts:
        if getattr(part, "hidden_size", None) is not None:
            return int(part.hidden_size)
        if getattr(part, "hidden_sizes", None) is not None:
            return int(max(part.hidden_sizes))
    return None
