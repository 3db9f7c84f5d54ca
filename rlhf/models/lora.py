"""Low-rank adapters (Hu et al. 2021, "LoRA") through PEFT: y = W x + (alpha / rank) B A x, with W frozen.

`inject` puts them in, `adapters_off` shows the base model, `merged` computes with W' = W + (alpha / rank) B A and
restores W bit for bit, `fold_adapters` does the same for an export. All sums are in fp32, then cast to W's type.

Under a sharded engine `merged` is for gathered parameters; the others do not care.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.config import LoraConfig
from rlhf.models.weights import NewParameter

ADAPTER = "default"  # PEFT's name for the only adapter; it is part of parameter names
_ALL_LINEAR = "all-linear"


class Fold(NamedTuple):
    """How an adapter joins the weight of its layer."""

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
            lora_alpha=config.alpha,
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


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Inside, the adapters are part of the weights, which is faster; outside, the weights are what they were.

    Fresh tensors are swapped in, nothing is added and subtracted again, so no bit changes. Costs a second copy of the
    adapted weights while it lasts. Does nothing to a model without adapters.
    """
    layers = list(adapted_layers(module).values())
    base = [layer.base_layer.weight for layer in layers]
    try:
        for layer in layers:
            layer.base_layer.weight = nn.Parameter(_merged_weight(layer), requires_grad=False)
        with _switched_off(layers):
            yield
    finally:
        for layer, weight in zip(layers, base, strict=True):
            layer.base_layer.weight = weight


def folds(module: nn.Module) -> dict[str, Fold]:
    """How each adapter of `module` folds into its layer, by layer name; empty without adapters."""
    return {name: _fold(layer) for name, layer in adapted_layers(module).items()}


def fold_adapters(tensors: Iterable[tuple[str, Tensor]], how: Mapping[str, Fold]) -> Iterator[tuple[str, Tensor]]:
    """Merge adapters into a stream of full tensors, under the plain names of the base model.

    Args:
        tensors: Names of `module.named_parameters()` and whole tensors, in any order.
        how: The `folds` of that module.

    Yields:
        Plain names and tensors; of an adapted layer only the merged weight, once its three tensors have arrived.
    """
    waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        layer, part = _split(name)
        if layer not in how or part == "bias":
            yield name.replace(".base_layer.", "."), tensor
            continue
        waiting[layer][part] = tensor
        if len(waiting[layer]) == 3:
            parts = waiting.pop(layer)
            yield f"{layer}.weight", _merge(parts["weight"], parts["lora_A"], b=parts["lora_B"], how=how[layer])
    assert not waiting, f"adapters or weights that never arrived: {sorted(waiting)[:3]}"


def adapter_key(name: str) -> str:
    """The key of an adapter's parameter in `adapter_model.safetensors`."""
    return "base_model.model." + name.replace(f".{ADAPTER}.", ".")


def exported_config(module: nn.Module, *, base: str, has_head: bool) -> PeftLoraConfig:
    """What `adapter_config.json` says, so that `PeftModel.from_pretrained(base, folder)` works.

    Args:
        module: A model with adapters.
        base: Path or hub id of the model they were trained on.
        has_head: Whether the scalar head belongs to the adapter.
    """
    settings = adapted_config(module).to_dict()
    settings |= {
        "base_model_name_or_path": base,
        "task_type": TaskType.SEQ_CLS if has_head else TaskType.CAUSAL_LM,
        "modules_to_save": ["score"] if has_head else None,
        "inference_mode": True,
    }
    return PeftLoraConfig(**settings)


def adapted_config(module: nn.Module) -> PeftLoraConfig:
    """The PEFT settings that `inject` chose for `module`."""
    return module.peft_config[ADAPTER]


def _linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer but the head, by name."""
    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else module.get_submodule("score")
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


def _top_layers(module: nn.Module, blocks: list[nn.Module], *, count: int) -> dict[str, object]:
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
    return Fold(scale=layer.scaling[ADAPTER], transposed=layer.fan_in_fan_out)


def _merged_weight(layer: LoraLayer) -> Tensor:
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return _merge(layer.base_layer.weight, a, b=b, how=_fold(layer))


@torch.no_grad()
def _merge(weight: Tensor, a: Tensor, *, b: Tensor, how: Fold) -> Tensor:
    """W + scale * B A for `weight` [out, in] (transposed: [in, out]), A [rank, in], B [out, rank]; in W's type."""
    product = b.float() @ a.float()
    product = product.T if how.transposed else product
    return torch.add(weight.float(), product, alpha=how.scale).to(weight.dtype)


def _split(name: str) -> tuple[str, str]:
    """`x.base_layer.weight`, `x.lora_A.default.weight` -> `x` and `weight`, `lora_A`."""
    for part in ("lora_A", "lora_B"):
        if f".{part}." in name:
            return name.partition(f".{part}.")[0], part
    layer, _, part = name.rpartition(".")
    return layer.removesuffix(".base_layer"), part
