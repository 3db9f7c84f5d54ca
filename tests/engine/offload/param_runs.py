"""What the tests of offloaded weights and of units run on one, two and four ranks; each returns numbers to compare."""

import copy
import tempfile

from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import LoraConfig
from rlhf.engine.engine import build_engine
from rlhf.engine.offload.working_weights import OffloadedShard
from rlhf.models.causal_lm import causal_lm
from rlhf.runtime import dist
from tests.engine import scenarios, tiny

EVERYTHING = 10**9
FP32_STEPS = {1: 6, 2: 20, 4: 6}
"""How many, by ranks: drift takes many steps to show, and the number of ranks takes one."""
BUFFERS = {"buffer_count": 3, "buffer_size": 2048}  # of 8,192 bytes: a block comes in several
STORES = {
    "device": {},
    "disk": {"offload_param": "nvme", **BUFFERS},
    "host": {"offload_param": "nvme", "parameters_in_cpu": EVERYTHING},
    "both": {"offload_param": "nvme", "parameters_in_cpu": 12_000, **BUFFERS},
}
KINDS = {
    "tied": {"kind": {"tied": True}},
    "odd": {"kind": {"odd": True}, "activation_checkpointing": True},
    "frozen": {"learns": lambda name: scenarios.is_adapter(name)},
    "small": {"persistence_threshold": 40},
    "ahead": {"prefetch_bucket_size": 20_000, "activation_checkpointing": True},
    "one": {"buffer_count": 1},
}


def offload_param(world):
    """Results of the functions of this file that are for so many ranks, by name."""
    parts = [stores]
    if world.size < 4:
        parts += [kinds, disturbed, frozen, adapters, peaks]
    if world.size == 2:
        parts += [collectives, persistent, ahead]
    with tempfile.TemporaryDirectory() as folder:
        return {part.__name__: part(world, folder) for part in parts}


def trained(world, folder, store, *, stage=3, **settings):
    """An engine whose working weights are in `store`, one of `STORES`."""
    steady = tiny.optimizer_config(schedule="constant", warmup_steps=0)
    settings = {"optimizer": steady, "nvme_path": folder} | STORES[store] | settings
    return tiny.engine(world, stage, **settings)


def stores(world, folder):
    """Steps in fp32 and two in bf16: losses and norms, weights and masters, by precision and store."""
    found = {}
    pair = ["device", "disk"]
    for precision, steps, names in (
        ("fp32", FP32_STEPS[world.size], pair),
        ("bf16", 2, pair if world.size == 4 else STORES),
    ):
        for store in names:
            engine = trained(world, folder, store, precision=precision)
            found[precision, store] = (
                scenarios.curve(engine, steps),
                scenarios.weights(engine),
                scenarios.weights(engine, masters=True),
            )
    return found


def kinds(world, folder):
    """The same for models and settings of several kinds, on the device and on disk."""
    found = {}
    for kind, settings in KINDS.items():
        for store in ("device", "disk"):
            engine = trained(world, folder, store, **settings)
            found[kind, store] = scenarios.curve(engine, 2), scenarios.weights(engine)
    return found


def disturbed(world, folder):
    """Losses and norms of a run with everything in its way that may be, of one without, and weights on the way."""
    ids = tiny.batch(50)[0]
    calm, busy, other = (trained(world, folder, "disk", precision="bf16") for _ in range(3))
    expected = scenarios.curve(calm, 1)
    with calm.evaluating() as model:
        logits = [model(ids)]
    expected += scenarios.curve(calm, 2, first=1, accumulation=1)
    raised = raises(busy, ids)
    found = scenarios.curve(busy, 1)
    scenarios.curve(other, 2)
    logits += looks(busy, ids)
    raised += raises(busy, ids, cut=1)
    for step in (1, 2):
        micro, counts = tiny.batch(step)
        mine = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
        loss = tiny.token_loss(busy(micro[mine]), micro[mine], counts[mine], counts.sum())
        other(ids)
        busy.backward(loss, last=True)
        busy(ids)
        total = dist.sum_over_ranks(loss.detach().double()).item()
        found.append((total, busy.step().grad_norm))
    return found, expected, logits, raised


def raises(engine, ids, cut=2):
    """1 when an error in the middle of a forward came through."""
    handle = engine.module.llama.model.layers[cut].mlp.register_forward_hook(lambda *_: 1 / 0)
    try:
        engine(ids)
    except ZeroDivisionError:
        return 1
    finally:
        handle.remove()
    return 0


def looks(engine, ids):
    """Logits by all ways to have them."""
    logits = []
    with engine.evaluating() as model:
        logits += [model(ids), model(ids)]
    with engine.generating() as model:
        logits += [model(ids), model(ids)]
    engine._streams = True
    with engine.generating() as model:
        logits += [model(ids), model(ids)]
    engine._streams = False
    return logits


def frozen(world, folder):
    """Of a frozen engine: logits, exported weights, and what FSDP2 remembers of forwards that had no backward."""
    ids = tiny.batch(50)[0]
    config = EngineConfig(zero_stage=3, precision="fp32", nvme_path=folder, **STORES["disk"])
    engine = build_engine(tiny.spec(), config=config, world=world)
    with engine.evaluating() as model:
        logits = [model(ids) for _ in range(3)]
    state = engine.module._get_fsdp_state()
    remembered = len(state._comm_ctx.post_forward_order) + len(state._fsdp_param_group._post_forward_indices)
    return logits, scenarios.weights(engine), remembered, gathered(engine)


def gathered(engine):
    """Elements of all parameters that stand in the model whole."""
    return sum(p.numel() for p in engine.module.parameters() if not isinstance(p, DTensor))


def adapters(world, folder):
    """Real adapters on weights that are on disk: what `scenarios.with_adapters` tells."""
    shared = dist.broadcast_object(folder)
    if world.is_main:
        tiny.reference().llama.save_pretrained(shared)
    dist.barrier()
    found = {}
    for store in ("device", "disk"):
        plan = causal_lm(shared, lora=LoraConfig(rank=4), seed=3)
        config = EngineConfig(zero_stage=3, precision="bf16", nvme_path=folder, **STORES[store])
        engine = build_engine(plan, config=config, world=world, optimizer=tiny.optimizer_config(lr=0.1), total_steps=10)
        found[store] = scenarios.with_adapters(engine, tiny.batch(50)[0])
    dist.barrier()
    return found


def live_bytes(engine):
    """Bytes of all memory that parameters have, sharded or gathered."""
    held = {}
    for module in engine._sharding.modules:
        for parameter in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
            local = parameter.sharded_param._local_tensor
            own = [] if isinstance(local, OffloadedShard) else [local]
            for tensor in [*own, *parameter.all_gather_outputs]:
                held[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(held.values())


def peaks(world, folder):
    """The most live bytes of parameters that forward and backward of a step see, by store and number of blocks."""
    found = {}
    for store in ("device", "disk"):
        for layers in (4, 16):
            engine = trained(world, folder, store, kind={"layers": layers}, prefetch_bucket_size=1)
            found[store, layers] = peak_of_a_step(engine) if engine._sharding.modules else None
    return found


def peak_of_a_step(engine):
    seen = []

    def look(*_):
        seen.append(live_bytes(engine))

    for block in engine.module.llama.model.layers:
        block.mlp.register_forward_hook(look)
        block.mlp.register_full_backward_hook(look)
    tiny.train_step(engine, 0)
    return max(seen), live_bytes(engine)


def collectives(world, folder):
    """Gathers and reductions of a step without accumulation, by stage and bucket size; losses and norms with it."""
    block = sum(p.numel() for p in tiny.reference().llama.model.layers[0].parameters())
    found = {}
    for stage in (1, 2, 3):
        for blocks in (1, 2, 3) if stage < 3 else (3,):
            checkpointing = {"activation_checkpointing": blocks == 2}
            engine = trained(world, folder, "device", stage=stage, reduce_bucket_size=blocks * block, **checkpointing)
            with CommDebugMode() as counted:
                points = scenarios.curve(engine, 1, accumulation=1)
            counts = {str(call): count for call, count in counted.get_comm_counts().items()}
            gathers = sum(count for call, count in counts.items() if "gather" in call)
            reductions = sum(count for call, count in counts.items() if "scatter" in call)
            found[stage, blocks] = gathers, reductions, points + scenarios.curve(engine, 1, first=1)
    return found


def persistent(world, folder):
    """With a threshold: which parameters are sharded and which are replicas, and the curve with and without one."""
    found = {}
    for stage in (2, 3):
        engine = trained(world, folder, "device", stage=stage, persistence_threshold=33)
        sharded = {name for name, p in engine.module.named_parameters() if isinstance(p, DTensor)}
        found[stage] = sharded, engine._sharding.replicas, scenarios.curve(engine, 3)
    return found, scenarios.curve(trained(world, folder, "device"), 3)


def ahead(world, folder):
    """The units that are gathered or on their way when each block computes, forward and backward, by settings."""
    found = {}
    for name, settings in {
        "one": {"prefetch_bucket_size": 1},
        "two": {"prefetch_bucket_size": 11_000},
        "few": {"prefetch_bucket_size": 11_000, "max_live_parameters": 22_000},
        "none": {"prefetch_bucket_size": 0},
        "alone": {"overlap_comm": False},
    }.items():
        engine = trained(world, folder, "device", **settings)
        found[name] = gathered_at(engine)
    return found


def gathered_at(engine):
    """By block: the numbers of the units that are gathered or on their way in its forward, then in its backward."""
    groups = [module._get_fsdp_state()._fsdp_param_group for module in engine._sharding.modules]
    forward, backward = {}, {}

    def note(seen, index):
        live = [i for i, group in enumerate(groups) if group.is_unsharded or group._all_gather_result is not None]
        seen.setdefault(index, live)

    for index, block in enumerate(engine.module.llama.model.layers):
        block.mlp.register_forward_hook(lambda *_, i=index: note(forward, i))
        block.mlp.register_full_backward_hook(lambda *_, i=index: note(backward, i))
    tiny.train_step(engine, 0, accumulation=1)
    return copy.deepcopy((forward, backward))
