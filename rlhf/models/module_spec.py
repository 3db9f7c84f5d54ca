"""A `ModelSpec` of a module that is in memory already, of any architecture: what the Hugging Face Trainer is given.

The module stays the same object, so whoever holds it goes on working. Its values are handed to the engine one parameter
at a time and freed as they are read.

[Note: own forward] At ZeRO 3 a unit is gathered for the forward of its module. A module may be a unit only if nothing
else reads its parameters. Transformers promises that for the layers that it can checkpoint. All other parameters belong
to the first unit, which is gathered as long as the model computes; only an input embedding that is not tied is its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.models.model_spec import ModelSpec, dropout_settings


class InMemoryWeights:
    """Values that are handed out once: rows of a parameter, which is then forgotten."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str, rows: slice) -> Tensor:
        """See `Weights.read`."""
        tensor = self._tensors.pop(name)  # Lifetime: the rows are copied before the next parameter is read
        return (tensor[rows] if tensor.ndim else tensor).cpu()


class InMemorySpec(ModelSpec):
    """The spec of a module in memory; `spec_of` makes one."""

    @property
    def frozen_blocks(self) -> list[nn.Module]:
        """None: inputs may require gradients (`enable_input_require_grads`), and backward then reaches all blocks."""
        return []

    def reads_alone(self, part: nn.Module) -> bool:
        """Whether `part` is an input embedding; see [Note: own forward]."""
        return any(part is embedding for embedding in _input_embeddings(self.module))


def spec_of(module: nn.Module) -> InMemorySpec:
    """Take the values out of a module, whose parameters are on meta afterwards.

    Raises:
        ValueError: a parameter is no floating-point number or has no value.
    """
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name} has type {parameter.dtype}; expected floating-point parameters. Quantised models cannot be "
                f"sharded: load the model without quantisation, or train it without `deepspeed`."
            )
        if parameter.is_meta:
            raise ValueError(f"{name} has no value (it is on meta); expected a model that is loaded into memory.")
    config = getattr(module, "config", None)
    config = config if isinstance(config, PreTrainedConfig) else PreTrainedConfig()
    weights = InMemoryWeights({name: parameter.detach() for name, parameter in parameters.items()})
    blocks = find_layers(module)
    replace_parameters(module, {id(parameter): _outline(parameter) for parameter in parameters.values()})
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    return InMemorySpec(module, weights, blocks, trainable, config)


def require_all_layers(module: nn.Module) -> None:
    """Raise ValueError where layers are dropped by chance: ranks that gather together must compute the same ones."""
    config = getattr(module, "config", None)
    found = dropout_settings(config) if isinstance(config, PreTrainedConfig) else {}
    dropped = {key: value for key, value in found.items() if "layerdrop" in key and value}
    if dropped:
        raise ValueError(
            f"the model's configuration has {dropped}: whole layers would be dropped by chance, on every rank others, "
            f"and ranks would wait for each other. Set it to 0, or use ZeRO stage 0."
        )


def replace_parameters(root: nn.Module, new: Mapping[int, nn.Parameter]) -> None:
    """Put new parameters, by the `id` of the old ones, wherever those are registered: tied ones in several places."""
    for part in root.modules():
        for key, parameter in list(part._parameters.items()):
            if id(parameter) in new:
                setattr(part, key, new[id(parameter)])  # not `register_parameter`: recurrent modules keep a list too


def _outline(parameter: nn.Parameter) -> nn.Parameter:
    outline = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(outline, requires_grad=parameter.requires_grad)


def find_layers(root: nn.Module) -> list[nn.Module]:
    """The outermost layers that transformers can checkpoint, in order; see [Note: own forward]."""
    uses = Counter(id(p) for _, p in root.named_parameters(remove_duplicate=False))
    found: list[nn.Module] = []
    inside: set[int] = set()
    for part in root.modules():
        if id(part) in inside or not isinstance(part, GradientCheckpointingLayer):
            continue
        own = Counter(id(p) for _, p in part.named_parameters(remove_duplicate=False))
        # A parameter that another module uses too must be gathered when that one computes.
        if own and all(uses[key] == count for key, count in own.items()):
            found.append(part)
            inside |= {id(child) for child in part.modules()}
    return found


def _input_embeddings(root: nn.Module) -> Iterator[nn.Module]:
    for part in root.modules():
        if isinstance(part, PreTrainedModel):
            try:
                embedding = part.get_input_embeddings()
            except NotImplementedError:  # images and audio have none
                continue
            if isinstance(embedding, nn.Embedding):
                yield embedding
