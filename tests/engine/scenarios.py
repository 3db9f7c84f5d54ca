"""What the tests of the engine run on one, two and four ranks; each function returns numbers for a test to compare.

All of them go into one start of the processes, because starting takes longer than running.
"""

import tempfile

import torch
from torch.distributed.tensor import DTensor

from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import LoraConfig
from rlhf.engine.engine import build_engine
from rlhf.engine.fsdp_units import full_tensor, sharded_like
from rlhf.engine.offload.grad_accumulation import DeviceGradAccumulator
from rlhf.engine.updater import StepResult
from rlhf.models.causal_lm import causal_lm
from rlhf.runtime import dist
from tests.engine import tiny
from tests.engine.offload.optimizer_runs import failing_disks, offload_optimizer  # noqa: F401 - found by name
from tests.engine.offload.param_runs import offload_param  # noqa: F401 - found by name

STAGES = (0, 1, 2, 3)
REDUCTIONS = {
    **{str(stage): (stage, {}) for stage in STAGES},
    "3, small ones whole": (3, {"persistence_threshold": 100}),
}


def everything(parts):
    """Results of the named functions of this file, on a rank that has joined the others."""
    torch.set_num_threads(1)
    world = dist.start("cpu")
    return {name: globals()[name](world) for name in parts}


def curve(engine, steps, *, first=0, accumulation=2):
    """Global loss and gradient norm of each step."""
    points = []
    for step in range(first, first + steps):
        loss, result = tiny.train_step(engine, step, accumulation=accumulation)
        total = dist.sum_over_ranks(torch.tensor(loss, dtype=torch.float64)).item()
        points.append((total, result.grad_norm))
    return points


def weights(engine, *, masters=False):
    """Every parameter, whole; with `masters`, those that are trained as their fp32 masters."""
    found = {name: tensor.clone() for name, tensor in engine.full_tensors()}
    return found | full_states(engine, "weight") if masters else found


def full_states(engine, key):
    """One entry of the optimizer's state for each trainable parameter, whole."""
    optimizer = engine._updater.optimizer
    parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    shards = ((name, p, optimizer.read_shard(name, key).to(p.device)) for name, p in parameters.items())
    return {name: full_tensor(sharded_like(p, shard)).cpu().clone() for name, p, shard in shards}


def first_gradient(engine):
    """The gradient that the first step saw: at step one AdamW's first moment is a tenth of it."""
    engine._sharding.release()
    return {name: moment / 0.1 for name, moment in full_states(engine, "exp_avg").items()}


def parity(world):
    """Ten steps and the weights after them, by stage."""
    found = {}
    for stage in STAGES:
        engine = tiny.engine(world, stage)
        found[stage] = curve(engine, 10), weights(engine)
    return found


def peeked(world):
    """A forward between the last backward and the step, which leaves weights gathered that the step outdates."""
    found = {}
    for stage in STAGES:
        engine = tiny.engine(world, stage)
        norms = []
        for step in range(3):
            ids, counts = tiny.batch(step)
            mine = slice(world.rank, None, world.size)
            loss = tiny.token_loss(engine(ids[mine]), ids[mine], counts[mine], counts.sum())
            engine.backward(loss, last=True)
            with torch.no_grad():
                engine(ids)
            norms.append(engine.step().grad_norm)
        found[stage] = norms
    return found


def at_rest(world):
    """What a rank holds after the first of two micro-batches, after the second, and after the step, by stage.

    Each time: whether every parameter is sharded, whether none is, and how many numbers of gradients there are.
    """
    found = {}
    for stage in STAGES:
        engine = tiny.engine(world, stage)
        ids, counts = tiny.batch(0)
        held = []
        for last in (False, True):
            engine.backward(tiny.token_loss(engine(ids), ids, counts, counts.sum()), last=last)
            held.append(holdings(engine))
        engine.step()
        found[stage] = [*held, holdings(engine)]
    return found


def holdings(engine):
    sharded = [isinstance(parameter, DTensor) for parameter in engine.module.parameters()]
    return all(sharded), not any(sharded), gradients_on_device(engine)


def gradients_on_device(engine):
    """How many gradient elements this rank keeps there."""
    replicas = engine._updater.gradients._replicas
    sums = [store.gradients for store in engine._updater.optimizer.stores] + ([replicas._sums] if replicas else [])
    on_device = [held for held in sums if isinstance(held, DeviceGradAccumulator)]
    return sum(gradient.numel() for held in on_device for gradient in held._sums.values())


def tied(world):
    """The same with tied embeddings, and whether they still are one parameter, by stage."""
    found = {}
    for stage in STAGES:
        engine = tiny.engine(world, stage, kind={"tied": True})
        points = curve(engine, 4)
        llama = engine.module.llama
        found[stage] = points, weights(engine), llama.lm_head.weight is llama.model.embed_tokens.weight
    return found


def odd(world):
    """Parameters of one row, parameters that no loss reaches, and recomputed activations, by stage."""
    found = {}
    for stage in STAGES:
        engine = tiny.engine(world, stage, kind={"odd": True}, activation_checkpointing=True)
        found[stage] = curve(engine, 3), weights(engine)
    return found


def is_adapter(name):
    """Stands for adapters: little that learns, among much that is frozen; nothing learns in the first block."""
    return "q_proj" in name and "layers.0" not in name


def adapters(world):
    """Frozen and learning parameters in one group, by stage."""
    found = {}
    for stage in STAGES:
        engine = tiny.engine(world, stage, learns=is_adapter)
        found[stage] = curve(engine, 3), weights(engine), {name for name, _ in engine._updater.optimizer.entries()}
    return found


def micro_batches(world):
    """The first gradient, by stage and accumulation."""
    found = {}
    for stage in STAGES:
        for accumulation in (1, 8 // world.size):
            engine = tiny.engine(world, stage, optimizer=tiny.optimizer_config(max_grad_norm=0))
            tiny.train_step(engine, 0, accumulation=accumulation)
            found[stage, accumulation] = first_gradient(engine)
    return found


def bf16(world):
    """Loss curve, first gradient, masters and working weights in bf16, by stage."""
    found = {}
    for stage in STAGES:
        engine = tiny.engine(world, stage, precision="bf16", optimizer=tiny.optimizer_config(max_grad_norm=0))
        points = curve(engine, 1)
        gradient = first_gradient(engine)
        points += curve(engine, 4, first=1)
        found[stage] = [loss for loss, _ in points], gradient, weights(engine, masters=True), weights(engine)
    return found


def bf16_sums(world):
    """The first gradient of one micro-batch a rank, and of two, with sums in fp32 and in bf16, by stage."""
    found = {}
    for stage in STAGES:
        for accumulation in (1, 2):
            pair = []
            for dtype in ("fp32", "bf16"):
                optimizer = tiny.optimizer_config(max_grad_norm=0)
                engine = tiny.engine(world, stage, precision="bf16", optimizer=optimizer, grad_accum_dtype=dtype)
                tiny.train_step(engine, 0, accumulation=accumulation)
                pair.append(first_gradient(engine))
            found[stage, accumulation] = pair
    return found


def reductions(world):
    """The first gradient, by precision, settings of the stage and micro-batches, reduced in fp32 and in bf16."""
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        for name, (stage, settings) in REDUCTIONS.items():
            for accumulation in (1, 2):
                for dtype in ("fp32", "bf16"):
                    settings = {**settings, "precision": precision, "reduce_dtype": dtype, "loss_scale": 1024.0}
                    engine = tiny.engine(world, stage, optimizer=tiny.optimizer_config(max_grad_norm=0), **settings)
                    tiny.train_step(engine, 0, accumulation=accumulation)
                    found[precision, name, accumulation, dtype] = first_gradient(engine)
    return found


def loading(world):
    """What each rank read, and what an engine exports before it learns, by stage."""
    found = {}
    for stage in STAGES:
        plan = tiny.spec()
        engine = build_engine(plan, config=EngineConfig(zero_stage=stage, precision="fp32"), world=world)
        found[stage] = plan.weights.reads, weights(engine)
    return found


def spoiled(world):
    """A gradient that is not finite on the last rank only: results, weights before and after, and what is raised."""
    found = {}
    for stage in STAGES:
        engine = tiny.engine(world, stage, max_skipped_steps=2)
        broken = world.rank == world.size - 1
        before = weights(engine)
        skipped = tiny.train_step(engine, 0, spoil=broken)[1]
        after = weights(engine)
        good = tiny.train_step(engine, 1)[1]
        tiny.train_step(engine, 2, spoil=broken)
        try:
            tiny.train_step(engine, 3, spoil=broken)
            message = ""
        except RuntimeError as error:
            message = str(error)
        found[stage] = StepResult(*skipped), StepResult(*good), before, after, message
    return found


def hybrid(world):
    """Generation between steps, of different lengths on the ranks, and once cut short by an error."""
    found = {}
    for stage in STAGES:
        engine = tiny.engine(world, stage, precision="bf16")
        ids = tiny.batch(50)[0]
        with engine.generating() as model:  # before any other forward
            gathered = model(ids)
        with engine.evaluating() as model:
            evaluated = model(ids)
        sharded = engine(ids).detach()
        before = weights(engine)
        tokens = decode(engine, ids[:2, :3], 2 + 3 * world.rank)
        cut_short(engine, ids)
        parameters = list(engine.module.parameters())
        state = [isinstance(p, DTensor) for p in parameters], engine.module.training, torch.is_grad_enabled()
        unchanged = all(torch.equal(tensor, before[name]) for name, tensor in weights(engine).items())
        points = curve(engine, 2)
        undisturbed = curve(tiny.engine(world, stage, precision="bf16"), 2)
        found[stage] = {
            "logits": (gathered, evaluated, sharded),
            "tokens": tokens,
            "state": state,
            "unchanged": unchanged,
            "curves": (points, undisturbed),
        }
    return found


def decode(engine, ids, count):
    """`count` greedy tokens, without a cache."""
    with engine.generating() as model:
        assert not model.training
        for _ in range(count):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids


def cut_short(engine, ids):
    """An error in the middle of a forward while generating."""
    handle = engine.module.llama.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    try:
        with engine.generating() as model:
            model(ids)
    except ZeroDivisionError:
        handle.remove()


def frozen(world):
    """Logits of a frozen engine, and whether anything of it learns or stays gathered."""
    found = {}
    ids = tiny.batch(50)[0]
    for stage in STAGES:
        config = EngineConfig(zero_stage=stage, precision="fp32")
        engine = build_engine(tiny.spec(), config=config, world=world)
        with engine.evaluating() as model:
            logits = [model(ids), model(ids)]
        direct = engine(ids)
        whole = [not isinstance(parameter, DTensor) for parameter in engine.module.parameters()]
        learns = any(parameter.requires_grad for parameter in engine.module.parameters())
        found[stage] = logits, direct, whole, learns, engine.module.training
    return found


def low_rank(world):
    """Real adapters: what `with_adapters` tells, by stage."""
    found = {}
    with tempfile.TemporaryDirectory() as mine:
        folder = dist.broadcast_object(mine)
        tiny.reference().llama.save_pretrained(folder)  # transformers lets the first rank write
        dist.barrier()
        for stage in STAGES:
            plan = causal_lm(folder, lora=LoraConfig(rank=4), seed=3)
            config = EngineConfig(zero_stage=stage, precision="fp32")
            optimizer = tiny.optimizer_config(lr=0.1)
            engine = build_engine(plan, config=config, world=world, optimizer=optimizer, total_steps=10)
            found[stage] = with_adapters(engine, tiny.batch(50)[0])
        dist.barrier()
    return found


def with_adapters(engine, ids):
    """Logits of evaluation and of generation, whether that left the weights alone, and two steps around it."""
    steps = [adapter_step(engine, 0)]
    before = weights(engine)
    with engine.evaluating() as model:
        evaluated = model(ids).logits
    with engine.generating() as model:
        generated = model(ids).logits
    same = all(torch.equal(tensor, before[name]) for name, tensor in weights(engine).items())
    return evaluated, generated, same, [*steps, adapter_step(engine, 1)]


def adapter_step(engine, step):
    ids, counts = tiny.batch(step)
    mine = slice(engine.world.rank, None, engine.world.size)
    loss = tiny.token_loss(engine(ids[mine]).logits, ids[mine], counts[mine], counts.sum())
    engine.backward(loss, last=True)
    return engine.step().grad_norm


def one_sided(world):
    """At stage 0, a parameter that only the first rank's loss reaches: that gradient, on all ranks."""
    engine = tiny.engine(world, 0, kind={"odd": True}, optimizer=tiny.optimizer_config(max_grad_norm=0))
    loss = engine(tiny.batch(0)[0]).mean()
    if world.rank == 0:
        loss = loss + 3 * engine.module.spare.sum()
    engine.backward(loss, last=True)
    engine.step()
    return first_gradient(engine)["spare"], weights(engine)
