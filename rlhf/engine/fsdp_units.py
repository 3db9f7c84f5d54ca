"""What travels together: the units in which a model is gathered, reduced, brought in and stepped, in forward order.

| unit | holds |
|---|---|
| the first | what is in no other: norms outside the blocks, small heads, tied embeddings |
| a module outside the blocks that owns an untied matrix | an embedding, a head |
| a block, or several (`reduce_bucket_size`, ZeRO 0 to 2) | all of its parameters |

So nothing larger than a block or one matrix need be live. Left out: who gathers them (`sharding.py`), and where they
rest (`tiers/residency.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from rlhf.config.engine_config import EngineConfig
from rlhf.models.lora import adapted_layers

if TYPE_CHECKING:
    from rlhf.models.model_spec import ModelSpec

ParameterGroup = dict[str, nn.Parameter]
"""Parameters that travel together, by name."""


@dataclass
class Unit:
    """Parameters that travel together."""

    modules: list[nn.Module]
    """Modules whose forwards use them; the whole model for the first unit."""
    names: list[str] = field(default_factory=list)
    """Of the parameters, in the model's order; one with two names under its first."""
    numel: int = 0
    """Elements of those that are gathered: all but the persistent ones."""
    needed_in_backward: bool = True
    """False for an embedding, whose gradient does not depend on its values."""

    def group(self, module: nn.Module) -> ParameterGroup:
        """Those of the unit's parameters that learn; `module` is the whole model."""
        found = ((name, module.get_parameter(name)) for name in self.names)
        return {name: parameter for name, parameter in found if parameter.requires_grad}


def find_units(spec: ModelSpec, *, config: EngineConfig) -> list[Unit]:
    """The units of a model that is not sharded yet, in the order of the forward pass."""
    persistent = persistent_parameters(spec.module, config)
    before, after = _outer_matrices(spec)
    units = [Unit([spec.module]), *before, *_buckets(spec.blocks, config), *after]
    unit_of = {id(parameter): unit for unit in units for part in unit.modules for parameter in part.parameters()}
    unit_of |= {id(p): unit for unit in units[1:] for part in unit.modules for p in part.parameters()}
    for name, parameter in spec.module.named_parameters():
        unit = unit_of[id(parameter)]
        unit.names.append(name)
        unit.numel += 0 if name in persistent else parameter.numel()
    return units


def persistent_parameters(module: nn.Module, config: EngineConfig) -> dict[str, nn.Parameter]:
    """The parameters that every rank keeps whole at ZeRO 3 because they are small, by name."""
    if config.zero_stage < 3:
        return {}
    return {name: p for name, p in module.named_parameters() if p.numel() < config.persistence_threshold}


def num_leaving(sizes: Sequence[int], share: float) -> int:
    """How many of the first groups leave the device so that `share` of all elements does: whole groups, or more.

    Args:
        sizes: elements of each group, whole, so that all ranks cut alike.
        share: of them, 0 to 1.
    """
    wanted, before = share * sum(sizes), 0
    for number, size in enumerate(sizes):
        if before >= wanted:
            return number
        before += size
    return len(sizes)


def gathered_ahead(units: list[Unit], *, config: EngineConfig) -> list[list[Unit]]:
    """For each of `units`, those after it that are gathered while it computes.

    At least one and then more, until they hold `prefetch_bucket_size` elements, but never so many that with the one
    that computes there are more than `max_live_parameters`.
    """
    if not config.overlap_comm:
        return [[] for _ in units]
    return [_ahead(units[index:], config) for index in range(len(units))]


def _ahead(units: list[Unit], config: EngineConfig) -> list[Unit]:
    chosen: list[Unit] = []
    waiting, live = 0, units[0].numel
    for unit in units[1:]:
        live += unit.numel
        if waiting >= config.prefetch_bucket_size or live > config.max_live_parameters:
            break
        waiting += unit.numel
        chosen.append(unit)
    return chosen


def _buckets(blocks: list[nn.Module], config: EngineConfig) -> Iterator[Unit]:
    """Consecutive blocks of up to `reduce_bucket_size` elements together; one at a time at ZeRO 3."""
    limit = config.reduce_bucket_size if config.zero_stage < 3 else 0
    bucket, held = Unit([]), 0
    for block in blocks:
        numel = sum(parameter.numel() for parameter in block.parameters())
        if bucket.modules and held + numel > limit:
            yield bucket
            bucket, held = Unit([]), 0
        bucket.modules.append(block)
        held += numel
    yield bucket


def _outer_matrices(spec: ModelSpec) -> tuple[list[Unit], list[Unit]]:
    """Modules outside the blocks with an untied matrix: those before the blocks, and those after them."""
    root, blocks = spec.module, spec.blocks
    uses = Counter(id(parameter) for _, parameter in root.named_parameters(remove_duplicate=False))
    taken = {id(part) for block in blocks for part in block.modules()}
    around = {id(part) for part in root.modules() if any(child is blocks[0] for child in part.modules())}
    adapted = {id(layer) for layer in adapted_layers(root).values()}
    before: list[Unit] = []
    after: list[Unit] = []
    units = before
    for part in root.modules():
        units = after if part is blocks[-1] else units
        owns = id(part) in adapted or any(min(p.shape) > 1 for p in part.parameters(recurse=False) if p.ndim >= 2)
        if id(part) in taken | around or not owns or any(uses[id(p)] > 1 for p in part.parameters()):
            continue
        units.append(Unit([part], needed_in_backward=not isinstance(part, nn.Embedding)))
        taken |= {id(child) for child in part.modules()}
    return before, after
