"""What the tests of resharding run on several ranks, as a program: train, save, load on others, go on."""

import pickle
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlhf.engine.checkpoint.checkpoint_state import CheckpointTensor
from rlhf.engine.checkpoint.checkpoints import Checkpoints
from rlhf.runtime import dist
from tests.engine import scenarios, tiny
from tests.ranks import fork_ranks

SAVED_AFTER, STEPS = 2, 4
SMALL = {"moments": "int8", "master_weights": "split", "grad_accum_dtype": "bf16"}
KINDS = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero3": {"stage": 3},
    "zero3 adapters": {"stage": 3, "learns": scenarios.is_adapter},
    "zero2 bf16 odd": {"stage": 2, "precision": "bf16", "kind": {"odd": True}},
    "zero1 cpu": {"stage": 1, "offload_optimizer": "cpu"},
    "zero0 bf16 moments": {"stage": 0, "moments": "bf16", "precision": "bf16"},
    "zero1 small": {"stage": 1, "precision": "bf16", **SMALL},
    "zero3 small": {"stage": 3, "precision": "bf16", "offload_optimizer": "nvme", **SMALL},
    "zero1 nvme": {"stage": 1, "offload_optimizer": "nvme"},
    "zero3 all on nvme": {"stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme", "precision": "bf16"},
}
ON_FOUR = {name: KINDS[name] for name in ("zero3", "zero1 nvme")}
FULL = ("zero0", "zero1", "zero3", "zero1 nvme")
"""Kinds of engines that train all of the same model in fp32."""


def engine(world, root, settings):
    """A trainable engine on the tiny model; what is offloaded to a disk is below `root`."""
    return tiny.engine(world, **settings, nvme_path=f"{root}/nvme", buffer_size=11_264)


def there(folder, world, *, asynchronous=True):
    return Checkpoints(Path(folder), world, keep=1, asynchronous=asynchronous)


def save(trained, folder, step):
    checkpoints = there(folder, trained.world)
    checkpoints.save(step, trained.checkpoint_tensors(), state={"engine": trained.counters()}, protected=set())
    return checkpoints


def load(trained, folder):
    checkpoints = there(folder, trained.world)
    saved = checkpoints.newest()
    checkpoints.load(saved, trained.checkpoint_tensors())
    trained.load_counters(saved.state["engine"])
    return saved.step


def train_and_save(trained, folder):
    """The steps before the checkpoint, and those after, which the checkpoint must not see."""
    before = scenarios.curve(trained, SAVED_AFTER)
    checkpoints = save(trained, folder, SAVED_AFTER)
    after = scenarios.curve(trained, STEPS - SAVED_AFTER, first=SAVED_AFTER)
    checkpoints.finish_save()
    return before + after, scenarios.weights(trained, masters=True)


def load_and_go_on(trained, folder):
    step = load(trained, folder)
    return scenarios.curve(trained, STEPS - step, first=step), scenarios.weights(trained, masters=True)


def same_ranks(world, root, kinds):
    """For each kind of engine: a run of its own, and the rest of it by an engine that loaded its checkpoint."""
    found = {}
    for name, settings in kinds.items():
        folder = f"{root}/{world.size}/{name}"
        found[name] = (
            train_and_save(engine(world, root, settings), folder),
            load_and_go_on(engine(world, root, settings), folder),
        )
    return found


def other_ranks(world, root, kinds, *, sources):
    """For each pair of a checkpoint and a kind of engine for the same model: the rest of the run."""
    return {
        (source, name): load_and_go_on(engine(world, root, settings), f"{root}/{source}")
        for source in sources
        for name, settings in kinds.items()
        if name in FULL
    }


def uneven(world, folder):
    """Uneven shards, ranks that hold nothing, and a tensor that all hold: what each rank has loaded of other rows."""
    whole = torch.arange(20.0).reshape(4, 5)
    shards = [range(3), range(3, 4), range(4, 4), range(4, 4)]
    wanted = [range(1, 4), range(2), range(3, 4), range(4, 4)][world.rank]
    loaded = {}

    def stored(key, rows):
        tensor = whole[rows.start : rows.stop]
        return CheckpointTensor(
            key, (4, 5), rows, torch.float32, True, lambda: tensor, lambda t: loaded.__setitem__(key, t.clone())
        )

    checkpoints = there(folder, world)
    tensors = [stored("sharded", shards[world.rank]), stored("all", range(4))]
    checkpoints.save(1, tensors, state={}, protected=set())
    checkpoints.finish_save()
    checkpoints.load(checkpoints.newest(), [stored("sharded", wanted), stored("all", shards[world.rank])])
    expected = {
        "sharded": whole[wanted.start : wanted.stop],
        "all": whole[shards[world.rank].start : shards[world.rank].stop],
    }
    files = [load_file(path) for path in sorted(Path(folder).rglob("rank-*.safetensors"))]
    return loaded, expected, [sum(tensor.nbytes for tensor in file.values()) for file in files]


def failing(world, folder):
    """One rank cannot write: what each rank is told, and what is left."""
    checkpoints = there(folder, world)
    trained = tiny.engine(world, 0)
    save(trained, folder, 1).finish_save()
    if world.rank == 1:
        (Path(folder) / "step-000002.partial").mkdir()
        (Path(folder) / "step-000002.partial/rank-00001.safetensors").mkdir()  # a folder where the file should be
    dist.barrier()
    try:
        save(trained, folder, 2).finish_save()
        message = ""
    except RuntimeError as error:
        message = str(error)
    dist.barrier()
    return message, checkpoints.newest().step, sorted(path.name for path in Path(folder).iterdir())


def damaged(world, folder):
    """One rank's file is damaged: what every rank is told."""
    trained = tiny.engine(world, 3)
    save(trained, folder, 1).finish_save()
    if world.is_main:
        file = Path(folder) / "step-000001" / f"rank-{world.size - 1:05d}.safetensors"
        data = bytearray(file.read_bytes())
        data[-50] ^= 1  # not in the header, which we do not read
        file.write_bytes(data)
    dist.barrier()
    try:
        load(trained, folder)
    except ValueError as error:
        return str(error)
    return ""


def everything(root, kinds, sources):
    """What two and four ranks do."""
    world = dist.start("cpu")
    return {
        "same": same_ranks(world, root, kinds),
        "other": other_ranks(world, root, kinds, sources=sources),
        "small": load_and_go_on(engine(world, root, KINDS["zero1 small"]), f"{root}/1/zero1 small"),
        "uneven": uneven(world, f"{root}/uneven-{world.size}"),
        "failing": failing(world, f"{root}/failing-{world.size}"),
        "damaged": damaged(world, f"{root}/damaged-{world.size}"),
    }


def alone(root, kinds, sources):
    """What one rank does."""
    world = dist.World.alone()
    if not sources:
        engine = tiny.engine(world, 0)
        return {
            "same": same_ranks(world, root, kinds),
            "plain": (scenarios.curve(engine, STEPS), scenarios.weights(engine)),
        }
    return other_ranks(world, root, kinds, sources=sources)


def main(root):
    """One rank, two and four, each of which loads what those before it have saved; and one again."""
    found = {1: fork_ranks(alone, 1, root, KINDS, [], alone=True)}
    found[2] = fork_ranks(everything, 2, root, KINDS, ["1/zero0"])
    found[4] = fork_ranks(everything, 4, root, ON_FOUR, ["2/zero1 nvme", "2/zero3"])
    sources = [f"2/{name}" for name in FULL] + ["4/zero3"]
    on_one = {name: KINDS[name] for name in ("zero0", "zero1 nvme")}
    (found[1][0]["other"],) = fork_ranks(alone, 1, root, on_one, sources, alone=True)
    Path(f"{root}/found").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
