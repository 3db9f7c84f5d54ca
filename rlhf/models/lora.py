"""Low-rank adapters (Hu et al. 2021, "LoRA") through PEFT: y = W x + (alpha / rank) B A x, with W frozen.

`inject` puts them in, `adapters_off` shows the base model, `fold_adapters` merges them for an export:
W' = W + (alpha / rank) B A, summed in fp32. Training, generation and evaluation never merge: what an adapter adds is
often smaller than the last bit of a bf16 weight, and W' rounded to bf16 is then W again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.config.model_config import LoraConfig
from rlhf.models.weights import NewParameter

ADAPTER = "default"  # PEFT's name for the only adapter; it is part of parameter names
_ALL_LINEAR = "all-linear"


class AdaptedLinear(Linear):
    """A linear layer of PEFT in which x W and what the adapter adds are summed before they are rounded to bf16.

    PEFT rounds x W first, and then loses what is smaller than half the last bit of it, as merged weights do. A bias is
    added afterwards, with and without the adapter alike: then an adapter that adds nothing changes no bit.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> [..., out], with the adapter unless it is switched off."""
        base: Any = self.base_layer
        weight, bias = base.weight, base.bias
        weight = weight if self.fan_in_fan_out else weight.T  # [in, out]
        rows = x.flatten(0, -2)  # [N, in]
        if self.disable_adapters:  # not the layer's own forward, which may round once with the bias
            return self._with_bias(rows @ weight, bias, like=x)
        change = self.lora_B[ADAPTER](self.lora_A[ADAPTER](self.lora_dropout[ADAPTER](rows)))  # [N, out]
        # A matrix product adds to what is there in its accumulators, which are fp32, and rounds once. In place: the
        # backward of `lora_B` does not need what it gave.
        return self._with_bias(change.addmm_(rows, weight, beta=self.scaling[ADAPTER]), bias, like=x)

    @staticmethod
    def _with_bias(found: Tensor, bias: Tensor | None, *, like: Tensor) -> Tensor:
        """`found` [N, out] in the shape of `like` [..., in], as [..., out]."""
        found = found.view(*like.shape[:-1], found.shape[-1])
        return found if bias is None else found + bias


class Fold(NamedTuple):
    """How an adapter is merged into the weight of its layer."""

    scale: float  # alpha / rank
    transposed: bool  # the weight is [in, out], as in GPT-2


def inject(module: nn.Module, config: LoraConfig, *, blocks: list[nn.Module]) -> dict[str, NewParameter]:
    """Put adapters into `module`, in place.

    Args:
        module: Parameters may be on meta; the adapters are.
        config: Rank above 0.
        blocks: The transformer blocks of `module` in forward order.

    Returns:
        The adapters' parameters by name. A is uniform in +-1 / sqrt(inputs) and B is 0: at first nothing changes.

    Raises:
        ValueError: A target names no linear layer, or there are fewer than `top_layers` blocks.
    """
    linear = _linear_layers(module)
    targets = _targets(config.targets, linear)
    inject_adapter_in_model(
        PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # annotated as int, used as a number
            lora_dropout=config.dropout,
            target_modules=targets,
            fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear.values()),
            bias="none",
            **_top_layers(module, blocks, count=config.top_layers),
        ),
        module,
        ADAPTER,
        low_cpu_mem_usage=True,
    )
    for layer in adapted_layers(module).values():
        layer.__class__ = AdaptedLinear  # PEFT's way to choose the class differs from version to version
    names = {name: parameter for name, parameter in module.named_parameters() if ".lora_" in name}
    if not names:
        raise ValueError(f"lora.targets={config.targets}: none of the last {config.top_layers} layers has one of them.")
    return {name: _first_values(name, parameter) for name, parameter in names.items()}


def adapted_layers(module: nn.Module) -> dict[str, LoraLayer]:
    """The layers that have an adapter, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, LoraLayer)}


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Inside, `module` is the base model; outside, it has its adapters again."""
    layers = list(adapted_layers(module).values())
    assert layers, "this model has no adapters to switch off"
    with _switched_off(layers):
        yield


def folds(module: nn.Module) -> dict[str, Fold]:
    """How each adapter of `module` is merged, by layer name; empty without adapters."""
    return {name: _fold(layer) for name, layer in adapted_layers(module).items()}


@dataclass
class Survival:
    """Measures how much of the adapters' change is left after merged weights are rounded to their stored type."""

    change: float = 0.0
    """Sum of squares of (alpha / rank) B A."""
    stored: float = 0.0
    """Scalar product of that and of what really changes in the stored weights."""

    @property
    def share(self) -> float:
        """Share of the change that is left along its own direction; 1 if there is none, or if rounding were random."""
        return self.stored / self.change if self.change else 1.0


def fold_adapters(
    tensors: Iterable[tuple[str, Tensor]],
    how: Mapping[str, Fold],
    *,
    dtype: torch.dtype | None = None,
    survival: Survival | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Merge adapters into a stream of full tensors, under the plain names of the base model.

    Args:
        tensors: Names of `module.named_parameters()` and whole tensors, in any order.
        how: The `folds` of that module.
        dtype: Merged weights, summed in fp32, are rounded to this type; None takes that of the weight.
        survival: What the rounding leaves is added here.

    Yields:
        Plain names and tensors; of an adapted layer only the merged weight, once its three tensors have arrived.
    """
    survival = Survival() if survival is None else survival
    waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        layer, part = _split(name)
        if layer not in how or part == "bias":
            yield name.replace(".base_layer.", "."), tensor
            continue
        waiting[layer][part] = tensor
        if len(waiting[layer]) == 3:
            parts = waiting.pop(layer)
            weight, change = parts["weight"], _change(parts["lora_A"], parts["lora_B"], how=how[layer])
            yield f"{layer}.weight", _merge(weight, change, dtype=dtype or weight.dtype, survival=survival)
    assert not waiting, f"adapters or weights that never arrived: {sorted(waiting)[:3]}"


def adapter_key(name: str) -> str:
    """The key of an adapter's parameter in `adapter_model.safetensors`."""
    return "base_model.model." + name.replace(f".{ADAPTER}.", ".")


def exported_config(module: nn.Module, *, base: str, has_head: bool) -> PeftLoraConfig:
    """The content of `adapter_config.json`, so that `PeftModel.from_pretrained(base, folder)` works.

    Args:
        module: A model with adapters.
        base: Path or hub id of the model they were trained on.
        has_head: Whether the scalar head belongs to the adapter.
    """
    settings = adapted_config(module).to_dict()  # type: ignore[no-untyped-call]
    settings |= {
        "base_model_name_or_path": base,
        "task_type": TaskType.SEQ_CLS if has_head else TaskType.CAUSAL_LM,
        "modules_to_save": ["score"] if has_head else None,
        "inference_mode": True,
    }
    return PeftLoraConfig(**settings)


def adapted_config(module: nn.Module) -> PeftLoraConfig:
    """The PEFT settings that `inject` chose for `module`."""
    config: PeftLoraConfig = cast(Any, module).peft_config[ADAPTER]
    return config


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
    """PEFT's way of naming the last `count` blocks; empty for all."""
    if count > len(blocks):
        raise ValueError(f"lora.top_layers={count}: expected 0 (all) to {len(blocks)}, the layers of this model.")
    if count == 0:
        return {}
    path = next(name for name, child in module.named_modules() if child is blocks[0])
    chosen = list(range(len(blocks) - count, len(blocks)))
    return {"layers_to_transform": chosen, "layers_pattern": path.split(".")[-2]}


def _first_values(name: str, parameter: nn.Parameter) -> NewParameter:
    if ".lora_B." in name:
        return NewParameter(shape=parameter.shape, fill=lambda values, generator: values.zero_())
    bound = 1 / math.sqrt(parameter.shape[1])
    return NewParameter(
        shape=parameter.shape, fill=lambda values, generator: values.uniform_(-bound, bound, generator=generator)
    )


@contextmanager
def _switched_off(layers: list[LoraLayer]) -> Iterator[None]:
    # PEFT's own switch also changes requires_grad, which an engine must not see change.
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


def _fold(layer: LoraLayer) -> Fold:
    return Fold(scale=layer.scaling[ADAPTER], transposed=cast(Any, layer).fan_in_fan_out)


@torch.no_grad()
def _change(a: Tensor, b: Tensor, *, how: Fold) -> Tensor:
    """(alpha / rank) B A in fp32, for A [rank, in] and B [out, rank]: [out, in], or transposed."""
    product = (b.float() @ a.float()).mul_(how.scale)
    return product.T if how.transposed else product


@torch.no_grad()
def _merge(weight: Tensor, change: Tensor, *, dtype: torch.dtype, survival: Survival) -> Tensor:
    """`weight` + `change`, summed in fp32, then in `dtype`; `change` is used up."""
    merged = torch.add(weight, change)  # fp32, as `change` is
    stored = merged.to(dtype, copy=True)
    # In place, since a layer may be large: what is stored, less what was there, times what should have been added.
    survival.stored += merged.copy_(stored).sub_(weight).mul_(change).sum().item()
    survival.change += change.square_().sum().item()
    return stored


def _split(name: str) -> tuple[str, str]:
    """`x.base_layer.weight`, `x.lora_A.default.weight` -> `x` and `weight`, `lora_A`."""
    for part in ("lora_A", "lora_B"):
        if f".{part}." in name:
            return name.partition(f".{part}.")[0], part
    layer, _, part = name.rpartition(".")
    return layer.removesuffix(".base_layer"), part
