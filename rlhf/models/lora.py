"""Low-rank adapters (Hu et al. 2021, "LoRA"): y = W x + (alpha / rank) B A x, with W frozen.

PEFT inserts the adapters and writes their folder; it is imported only in runs with adapters, since the import takes
most of a second. Training, generation and evaluation never merge: the change of an adapter is often smaller than the
last bit of a bf16 weight, and W + (alpha / rank) B A rounded to bf16 is then W again. Only an export merges, in fp32.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.config.stage_configs import LoraConfig
from rlhf.models.weights import NewParameter, plain_name

ADAPTER = "default"  # PEFT's name for the only adapter; it is part of parameter names
_ALL_LINEAR = "all-linear"


class AdaptedLinear(nn.Module):
    """A linear layer with an adapter, whose sum is rounded to bf16 once.

    PEFT's own layer rounds x W first and then loses any change smaller than half its last bit, as merged weights do.
    The bias is added afterwards, with and without the adapter, so that an adapter that adds nothing changes no bit.
    `inject` turns the layers that PEFT made into objects of this class; the submodules and their names are PEFT's.
    """

    base_layer: nn.Linear | Conv1D
    lora_A: nn.ModuleDict  # noqa: N815
    lora_B: nn.ModuleDict  # noqa: N815
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]  # alpha / rank
    fan_in_fan_out: bool  # True where the weight is [in, out], as in GPT-2
    adapter_is_off: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> [..., out], with the adapter unless it is switched off."""
        weight = self.weight if self.fan_in_fan_out else self.weight.T  # [in, out]
        rows = x.flatten(0, -2)  # [..., in] -> [N, in]
        if self.adapter_is_off:  # not the base layer's own forward, which may round once with the bias
            out = rows @ weight  # [N, out]
        else:
            change = self.lora_B[ADAPTER](self.lora_A[ADAPTER](self.lora_dropout[ADAPTER](rows)))  # [N, out]
            # A matrix product adds to what is there in its accumulators, which are fp32, and rounds once. In place: the
            # backward of `lora_B` does not need its output.
            out = change.addmm_(rows, weight, beta=self.scaling[ADAPTER])
        out = out.view(*x.shape[:-1], out.shape[-1])  # [N, out] -> [..., out]
        return out if self.bias is None else out + self.bias

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer; some models of transformers read it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer."""
        return self.base_layer.bias


def inject(module: nn.Module, config: LoraConfig, *, blocks: list[nn.Module]) -> dict[str, NewParameter]:
    """Insert adapters into `module`, in place.

    Args:
        module: Its parameters may be on meta; the adapters are.
        config: With a rank above 0.
        blocks: The transformer blocks of `module` in forward order.

    Returns:
        The adapters' parameters by name. A is uniform in +-1 / sqrt(inputs) and B is 0: at first nothing changes.

    Raises:
        ValueError: A target names no linear layer, or there are fewer than `top_layers` blocks.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    linear = _linear_layers(module)
    settings = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # annotated as int, used as a number
        lora_dropout=config.dropout,
        target_modules=_targets(config.targets, linear),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear.values()),
        bias="none",
        **_top_layers(module, blocks, count=config.top_layers),
    )
    inject_adapter_in_model(settings, module, ADAPTER, low_cpu_mem_usage=True)
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            cast(Any, layer).__class__ = AdaptedLinear  # PEFT's way to choose a class differs from version to version
    adapters = {name: parameter for name, parameter in module.named_parameters() if is_adapter(name)}
    if not adapters:
        raise ValueError(f"lora.targets={config.targets}: none of the last {config.top_layers} layers has one of them.")
    return {name: _first_values(name, parameter) for name, parameter in adapters.items()}


def is_adapter(name: str) -> bool:
    """Whether the parameter of that name belongs to an adapter."""
    return ".lora_" in name


def adapted_layers(module: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers that have an adapter, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, AdaptedLinear)}


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Switch the adapters of `module` off inside the context, so that it computes what its base model would."""
    layers = adapted_layers(module).values()
    assert layers, "this model has no adapters to switch off"
    try:
        for layer in layers:
            layer.adapter_is_off = True  # `requires_grad` stays as it is: the engine must not see it change
        yield
    finally:
        for layer in layers:
            layer.adapter_is_off = False


@dataclass
class MergePrecision:
    """Measures how much of the adapters' change is left after merged weights are rounded to their stored type."""

    change: float = 0.0
    """Sum of squares of (alpha / rank) B A."""
    stored: float = 0.0
    """Scalar product of that with the change in the stored weights."""

    @property
    def share(self) -> float:
        """Share of the change that is left along its own direction; 1 if there is none, or if rounding were random."""
        return self.stored / self.change if self.change else 1.0


def merge_adapters(
    tensors: Iterable[tuple[str, Tensor]],
    layers: Mapping[str, AdaptedLinear],
    *,
    dtype: torch.dtype | None = None,
    precision: MergePrecision | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Merge adapters into a stream of whole tensors, under the plain names of the base model.

    Args:
        tensors: Names of `module.named_parameters()` and whole tensors, in any order.
        layers: The `adapted_layers` of that module; their parameters are not read.
        dtype: Merged weights, summed in fp32, are rounded to this type; None takes that of the weight.
        precision: Counts how much of the change the rounding keeps.

    Yields:
        Plain names and tensors; for an adapted layer only the merged weight, once its three tensors have arrived.
    """
    precision = precision or MergePrecision()
    waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        layer, part = _split(name)
        if layer not in layers or part == "bias":
            yield plain_name(name), tensor
            continue
        waiting[layer][part] = tensor
        if len(waiting[layer]) == 3:
            parts = waiting.pop(layer)
            weight, change = parts["weight"], _change(parts["lora_A"], parts["lora_B"], layer=layers[layer])
            yield f"{layer}.weight", _merge(weight, change, dtype=dtype or weight.dtype, precision=precision)
    assert not waiting, f"adapters or weights that never arrived: {sorted(waiting)[:3]}"


def save_adapter(folder: Path, module: nn.Module, *, adapters: Mapping[str, Tensor], base: str) -> None:
    """Write the adapters of `module` so that `PeftModel.from_pretrained(base model, folder)` loads them.

    Args:
        folder: Made here.
        module: A model with adapters.
        adapters: The adapters' tensors by name, and the scalar head where there is one.
        base: Path or hub id of the model they were trained on.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import TaskType

    folder.mkdir()
    tensors = {"base_model.model." + name.replace(f".{ADAPTER}.", "."): t.contiguous() for name, t in adapters.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    injected: PeftLoraConfig = cast(Any, module).peft_config[ADAPTER]
    has_head = "score.weight" in adapters
    settings = injected.to_dict() | {  # type: ignore[no-untyped-call]
        "base_model_name_or_path": base,
        "task_type": TaskType.SEQ_CLS if has_head else TaskType.CAUSAL_LM,
        "modules_to_save": ["score"] if has_head else None,
        "inference_mode": True,
    }
    PeftLoraConfig(**settings).save_pretrained(str(folder))


def _linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer but the head, by name."""
    head = (
        cast(Any, module).get_output_embeddings()
        if isinstance(module, PreTrainedModel)
        else module.get_submodule("score")
    )
    return {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear | Conv1D) and child is not head
    }


def _targets(wanted: list[str], linear: Mapping[str, nn.Module]) -> list[str]:
    """The last parts of names by which PEFT finds the layers to adapt."""
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    unknown = [
        target
        for target in wanted
        if target != _ALL_LINEAR and not any(f".{name}".endswith(f".{target}") for name in linear)
    ]
    if unknown or not wanted:
        raise ValueError(
            f"lora.targets={wanted}: {unknown} names no linear layer. Expected {_ALL_LINEAR}, or {leaves}."
        )
    return leaves if _ALL_LINEAR in wanted else list(wanted)


def _top_layers(module: nn.Module, blocks: list[nn.Module], *, count: int) -> dict[str, Any]:
    """The settings that make PEFT adapt only the last `count` blocks; empty for all of them."""
    if count > len(blocks):
        raise ValueError(f"lora.top_layers={count}: expected 0 (all) to {len(blocks)}, the layers of this model.")
    if count == 0:
        return {}
    path = next(name for name, child in module.named_modules() if child is blocks[0])
    chosen = list(range(len(blocks) - count, len(blocks)))
    return {"layers_to_transform": chosen, "layers_pattern": path.split(".")[-2]}


def _first_values(name: str, parameter: nn.Parameter) -> NewParameter:
    if ".lora_B." in name:
        return NewParameter(parameter.shape, fill=lambda values, generator: values.zero_())
    bound = 1 / math.sqrt(parameter.shape[1])
    return NewParameter(
        parameter.shape, fill=lambda values, generator: values.uniform_(-bound, bound, generator=generator)
    )


@torch.no_grad()
def _change(a: Tensor, b: Tensor, *, layer: AdaptedLinear) -> Tensor:
    """(alpha / rank) B A in fp32 of A [rank, in] and B [out, rank], laid out as the weight, [out, in] or [in, out]."""
    product = (b.float() @ a.float()).mul_(layer.scaling[ADAPTER])
    return product.T if layer.fan_in_fan_out else product


@torch.no_grad()
def _merge(weight: Tensor, change: Tensor, *, dtype: torch.dtype, precision: MergePrecision) -> Tensor:
    """`weight` + `change`, summed in fp32, then in `dtype`; `change` is overwritten."""
    merged = torch.add(weight, change)  # fp32, as `change` is
    stored = merged.to(dtype, copy=True)
    # In place, since a layer may be large: (stored - weight) * change, the product with what should have been added.
    precision.stored += merged.copy_(stored).sub_(weight).mul_(change).sum().item()
    precision.change += change.square_().sum().item()
    return stored


def _split(name: str) -> tuple[str, str]:
    """`x.base_layer.weight`, `x.lora_A.default.weight` -> `x` and `weight`, `lora_A`."""
    for part in ("lora_A", "lora_B"):
        if f".{part}." in name:
            return name.partition(f".{part}.")[0], part
    layer, _, part = name.rpartition(".")
    return layer.removesuffix(".base_layer"), part
