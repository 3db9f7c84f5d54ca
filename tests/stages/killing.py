"""Runs that are killed again and again until they are finished, beside one that is left alone.

A program of its own (`tests/forking.py`), which is forked again for each life of a run. A life ends by SIGKILL in the
middle of what a checkpoint is made of (a write, an fsync, a rename, a removal) or of a step, at a place that the seed
decides; with several ranks, one of them dies.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from rlhf.rollout import Collector
from rlhf.runtime.dist import broadcast_object
from rlhf.runtime.process import end_with_parent
from rlhf.tracking.tracker import Tracker
from stages.lifecycle.checkpointing import Stopped
from stages.pipeline import run_stages, start_rank
from stages.setup.compose import CONF_DIR, register_schema, to_run
from stages.setup.preflight import preflight
from tests.forking import fork_until_death
from tests.ranks import forbid_unpickling

SETTINGS = [
    *("experiment=smoke", "engine.precision=fp32", "checkpoint.every=0.25"),
    *("tracking.progress=plain", "tracking.report=false"),
    *("sft.max_steps=6", "sft.eval_every=3", "sft.dropout=0.1", "sft.optimizer.schedule=constant"),
    "sft.optimizer.lr=0.06",  # so that the evaluation after step 3 is the best
    *("reward.max_steps=8", "reward.lora.rank=4", "reward.dropout=0.1"),
    *("stage=[sft,reward,dpo,ppo]", "dpo.max_steps=4", "dpo.eval_every=2"),
    *("ppo.iterations=4", "ppo.eval_every=2", "ppo.kl.target=1.0", "ppo.max_response_tokens=8"),
    *("reward.micro_batch_size=8", "reward.micro_batch_tokens=300"),
    *("ppo.micro_batch_size=8", "ppo.micro_batch_tokens=150"),
    *("ppo.reference_update_every=1", "ppo.ptx.coef=0.5", "data.ptx.train=${data.sft.train}"),
]
PLACES = {
    "write": (os, "pwrite"),
    "fsync": (os, "fsync"),
    "rename": (Path, "rename"),
    "remove": (shutil, "rmtree"),
    "log": (Tracker, "log"),
    "collect": (Collector, "collect"),
}
STOPPED = 3


def live(settings, ranks, *, death):
    """One life of a rank; `death` is the place of it, the number of calls before, and the signal."""
    with initialize_config_dir(CONF_DIR, version_base=None):
        run = to_run(compose("config", overrides=settings))
    Path(run.output_dir).mkdir(parents=True, exist_ok=True)  # as whoever starts the ranks does, when it locks it
    forbid_unpickling()
    world = start_rank(run)
    torch.set_num_threads(1)
    todo = broadcast_object(preflight(run, ranks=ranks) if world.is_main else [])
    if death is not None:
        arm(*death)
    try:
        run_stages(run, todo, world=world)
    except Stopped:
        sys.exit(STOPPED)


def arm(place, calls, sent):
    """Send a signal to this process after `calls` calls of the place: half of them before, half of them after it."""
    owner, name = PLACES[place]
    function, left = getattr(owner, name), [calls]

    def tick():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), sent)

    def ticking(*args, **options):
        tick()
        result = function(*args, **options)
        tick()
        return result

    setattr(owner, name, ticking)


def life(settings, *, ranks=1, death=None, mortal=0):
    """Run all ranks until they end; the exit status of the mortal one."""

    def work(rank):
        live(settings, ranks, death=death if rank == mortal else None)

    return fork_until_death(work, ranks)[mortal]


def deaths(seed, count):
    """Places and times, every place in turn, and one polite interruption."""
    numbers = random.Random(seed)
    places = [*PLACES] * count
    for place in places[:count]:
        yield place, numbers.randint(1, {"write": 250, "log": 24, "rename": 12}.get(place, 8)), signal.SIGKILL
    yield "log", numbers.randint(3, 6), signal.SIGTERM


def killed_until_finished(folder, settings, *, ranks, seed, count):
    """What happened in each life: how it ended, and what it left; the last one is immortal."""
    history = []
    for number, death in enumerate(deaths(seed, count)):
        status = life(settings, ranks=ranks, death=death, mortal=number % ranks)
        left = sorted(str(path.relative_to(folder)) for path in folder.glob("*/checkpoints/*"))
        history.append({"death": [death[0], death[1], int(death[2])], "status": status, "left": left})
        if status == 0:
            break
    return [*history, {"death": None, "status": life(settings, ranks=ranks), "left": []}]


def main(root, seed):
    """The pipeline on one rank, and PPO on two, each of them left alone and killed."""
    started = time.monotonic()
    torch.set_num_threads(1)
    end_with_parent(os.getppid())
    register_schema()
    found = {}
    tokens = f"data.cache_dir={root / 'tokens'}"
    one = {name: [*SETTINGS, tokens, f"output_dir={root / name}"] for name in ("whole", "killed")}
    found["whole"] = life(one["whole"])
    shorter = ["stage=[sft]", tokens, *SETTINGS[:5], *(each for each in SETTINGS if each.startswith("sft."))]
    found["until_best"] = life([*shorter, "sft.max_steps=3", f"output_dir={root}/until_best"])
    found["killed"] = killed_until_finished(root / "killed", one["killed"], ranks=1, seed=seed, count=6)
    models = [f"ppo.actor={root}/whole/sft/model", f"ppo.reward={root}/whole/reward/model", "stage=[ppo]"]
    two = {
        name: [*SETTINGS[:5], *SETTINGS[-4:], *models, tokens, "engine=zero3", f"output_dir={root / name}"]
        for name in ("whole2", "killed2")
    }
    found["whole2"] = life(two["whole2"], ranks=2)
    found["killed2"] = killed_until_finished(root / "killed2", two["killed2"], ranks=2, seed=seed + 1, count=2)
    found["seconds"] = time.monotonic() - started
    (root / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
