"""FSDP units: which parameters are gathered, reduced, offloaded and updated together, and how each is sharded.

| unit | holds |
|---|---|
| the first | all that is in no other: norms outside the blocks, small heads, tied embeddings |
| a module outside the blocks that owns an untied matrix | an embedding, a head |
| a block, or several (`reduce_bucket_size`, ZeRO 0 to 2) | all of its parameters |

So at ZeRO 3, nothing larger than a block or one matrix has to be in memory at a time. Units are in forward order.

FSDP2 shards dimension 0 evenly: of those that share a copy (`engine.shard_ranks`), every rank holds
`ceil(size / ranks)` rows of a parameter, the last ranks fewer or none. A tensor that is not a DTensor is held whole by
every rank, and counts as its own shard.
See also: who gathers them (`sharding.py`), and where offloaded ones are kept (`offload/weight_stores.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlhf.config.engine_config import EngineConfig
from rlhf.models.lora import adapted_layers
from rlhf.models.model_spec import ModelSpec

ParameterGroup = dict[str, nn.Parameter]
"""Parameters by name."""


@dataclass
class FSDPUnit:
    """Parameters that are gathered together."""

    modules: list[nn.Module]
    """Modules whose forwards use them; the whole model for the first unit."""
    names: list[str] = field(default_factory=list)
    """The parameters' names, in the model's order; one with two names under its first."""
    numel: int = 0
    """Elements that are gathered: all but those of persistent parameters."""
    needed_in_backward: bool = True
    """False for an embedding, whose gradient does not depend on its values, and for blocks below what learns."""

    @property
    def fsdp_module(self) -> FSDPModule:
        """The module by which FSDP2 knows the unit, once it is sharded."""
        module = self.modules[0]
        assert isinstance(module, FSDPModule), "the unit is not sharded yet"
        return module

    def group(self, module: nn.Module) -> ParameterGroup:
        """The unit's trainable parameters; `module` is the whole model."""
        found = ((name, module.get_parameter(name)) for name in self.names)
        return {name: parameter for name, parameter in found if parameter.requires_grad}


def find_units(spec: ModelSpec, *, config: EngineConfig) -> list[FSDPUnit]:
    """The units of a model that is not sharded yet, in the order of the forward pass."""
    persistent = persistent_parameters(spec.module, config)
    before, after = _outer_matrices(spec)
    units = [FSDPUnit([spec.module]), *before, *_buckets(spec.blocks, config), *after]
    # The root comes first, so that every other unit takes its own parameters from it.
    unit_of = {id(parameter): unit for unit in units for part in unit.modules for parameter in part.parameters()}
    for name, parameter in spec.module.named_parameters():
        unit = unit_of[id(parameter)]  # by id: a tied parameter is listed once, under its first name
        unit.names.append(name)
        unit.numel += 0 if name in persistent else parameter.numel()
    unreached = {id(block) for block in spec.frozen_blocks}
    for unit in units:
        unit.needed_in_backward &= not unreached.issuperset(map(id, unit.modules))
    return units


def persistent_parameters(module: nn.Module, config: EngineConfig) -> ParameterGroup:
    """The parameters that every rank keeps whole, by name: single numbers, and at ZeRO 3 small ones."""
    limit = config.persistence_threshold if config.zero_stage == 3 else 0
    return {name: p for name, p in module.named_parameters() if p.ndim == 0 or p.numel() < limit}


def prefetched_units(units: list[FSDPUnit], *, config: EngineConfig) -> list[list[FSDPUnit]]:
    """For each of `units`, those after it that are gathered while it computes.

    At least one and then more, until they hold `prefetch_bucket_size` elements, but never so many that together with
    the computing unit there are more than `max_live_parameters`.
    """
    ahead: list[list[FSDPUnit]] = [[] for _ in units]
    for index, chosen in enumerate(ahead if config.overlap_comm else ()):
        prefetched, live = 0, units[index].numel
        for unit in units[index + 1 :]:
            live += unit.numel
            # Sizes are those of whole units, so all ranks prefetch the same ones and their all-gathers match.
            if prefetched >= config.prefetch_bucket_size or live > config.max_live_parameters:
                break
            prefetched += unit.numel
            chosen.append(unit)
    return ahead


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory with `tensor`; the tensor itself when it is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(parameter: Tensor) -> range:
    """The rows of the whole parameter that this rank holds; a scalar is one row."""
    total = parameter.shape[0] if parameter.ndim else 1
    if not isinstance(parameter, DTensor):
        return range(total)
    mesh = parameter.device_mesh  # its last dimension is the one that shares a copy
    return rows_of(total, ranks=mesh.size(mesh.ndim - 1), rank=mesh.get_local_rank(mesh.ndim - 1))


def rows_of(total: int, *, ranks: int, rank: int) -> range:
    """The rows of `total` that a rank holds."""
    share = -(-total // ranks)
    return range(min(rank * share, total), min((rank + 1) * share, total))


def sharded_like(parameter: Tensor, shard: Tensor) -> Tensor:
    """A tensor sharded as `parameter` is, whose local shard is `shard` and shares its memory."""
    if not isinstance(parameter, DTensor):
        return shard
    # Shape and stride are given because ranks may hold unequal shards, or none: they cannot be inferred from one.
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,  # a check would be a collective for each parameter
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank; a collective, so all ranks must call it in the same order."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    whole: Tensor = tensor.full_tensor()  # all-gather
    return whole


def _buckets(blocks: list[nn.Module], config: EngineConfig) -> Iterator[FSDPUnit]:
    """Consecutive blocks of up to `reduce_bucket_size` elements together; one at a time at ZeRO 3."""
    # At ZeRO 3 a bucket would be gathered as a whole, which is what stage 3 is there to avoid.
    limit = config.reduce_bucket_size if config.zero_stage < 3 else 0
    bucket, held = FSDPUnit([]), 0
    for block in blocks:
        numel = sum(parameter.numel() for parameter in block.parameters())
        if bucket.modules and held + numel > limit:
            yield bucket
            bucket, held = FSDPUnit([]), 0
        bucket.modules.append(block)
        held += numel
    if bucket.modules:
        yield bucket


def _outer_matrices(spec: ModelSpec) -> tuple[list[FSDPUnit], list[FSDPUnit]]:
    """Modules outside the blocks that own an untied matrix: those before the blocks, and those after them."""
    root, blocks = spec.module, spec.blocks
    if not blocks:
        return [], []
    uses = Counter(id(parameter) for _, parameter in root.named_parameters(remove_duplicate=False))
    taken = {id(part) for block in blocks for part in block.modules()}
    # The blocks' ancestors, the root among them, are no units: their parameters belong to the first one.
    ancestors = {id(part) for part in root.modules() if any(child is blocks[0] for child in part.modules())}
    # An adapted layer is one unit with its adapters, although the matrix hangs one level below it.
    adapted = {id(layer) for layer in adapted_layers(root).values()}
    before: list[FSDPUnit] = []
    after: list[FSDPUnit] = []
    units = before
    for part in root.modules():
        units = after if part is blocks[-1] else units
        # A matrix of one row (the score head) is not worth an all-gather of its own.
        owns = id(part) in adapted or any(min(p.shape) > 1 for p in part.parameters(recurse=False) if p.ndim >= 2)
        # Tied matrices stay in the first unit: two modules use them, and a unit is gathered for one module's forward.
        if id(part) in taken | ancestors or not owns or any(uses[id(p)] > 1 for p in part.parameters()):
            continue
        if not spec.reads_alone(part):
            continue
        units.append(FSDPUnit([part], needed_in_backward=not isinstance(part, nn.Embedding)))
        taken |= {id(child) for child in part.modules()}
    return before, after
