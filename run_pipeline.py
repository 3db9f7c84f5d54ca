"""The table of contents: SFT -> reward model -> PPO.

The configuration is composed once; then the chosen stages run in order, those that are finished are skipped, and a
table says what was learnt. With `launch.ranks=N` each stage runs on N processes; under torchrun on those it started.

    python run_pipeline.py                       the whole pipeline on the embedded model and data
    python run_pipeline.py stage=sft             one stage
    python run_pipeline.py engine=zero3 launch.ranks=2
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Read when torch and the tokenizers are imported. Threads that spin while they wait stall a machine that is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import hydra
from omegaconf import DictConfig

from rlhf import launch
from rlhf.config import Progress, RunConfig
from rlhf.dist import World, broadcast_object, start, stop
from rlhf.tracking.console import setup_logging
from rlhf.tracking.table import printable
from stages.composition import CONF_DIR, check_overrides, load_run, register_schema, save_run, to_run
from stages.handover import lock_folder
from stages.ppo import run_ppo
from stages.preflight import preflight
from stages.results import show_results
from stages.reward import run_reward
from stages.sft import run_sft

STAGES = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo}
_WORKER = "--worker"


def main() -> None:
    """Run what the command line asks for; mistakes in it and interruptions end with one sentence, not a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        start_or_work()
    except KeyboardInterrupt:
        is_rank = launch.under_torchrun()
        sys.exit(1 if is_rank else "interrupted: finished stages are kept; the same command goes on after them")


def start_or_work() -> None:
    """Start a run, or be one of the ranks that a run has started."""
    if sys.argv[1:2] == [_WORKER]:
        run = load_run(Path(sys.argv[2]))
        run_stages(run, sys.argv[3:], world=start_rank(run))
        return
    register_schema()
    if not any(word.startswith(("-m", "--multirun", "--config")) for word in sys.argv[1:]):
        with one_sentence():
            check_overrides([word for word in sys.argv[1:] if not word.startswith("-") and set("=~") & set(word)])
    compose_and_start()


@hydra.main(version_base=None, config_path=CONF_DIR, config_name="config")
def compose_and_start(config: DictConfig) -> None:
    """Compose once, check everything, and run the stages here, on ranks we start, or on those torchrun started."""
    run = to_run(config)
    with one_sentence():
        world = start_rank(run) if launch.under_torchrun() else World.alone()
        setup_logging(world, quiet=run.tracking.progress is Progress.quiet)
        ranks = world.size if launch.under_torchrun() else run.launch.ranks
        lock = lock_folder(run) if world.is_main else None
        todo = broadcast_object(preflight(run, ranks=ranks) if world.is_main else [])
    path = save_run(run) if world.is_main else None
    if todo and ranks > world.size:
        exit_status = launch.run_ranks(Path(__file__), _WORKER, str(path), *todo, ranks=ranks)
        if exit_status != 0:
            sys.exit(exit_status)
    elif todo:
        run_stages(run, todo, world=world if world.size > 1 else start_rank(run))
    if lock is not None:
        show_results(run)
        lock.close()


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the program with the message of a ValueError; HYDRA_FULL_ERROR=1 shows where it came from."""
    try:
        yield
    except ValueError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit("\n".join(map(printable, f"error: {error}".split("\n"))))


def start_rank(run: RunConfig) -> World:
    """Join the other ranks and share the cores with them."""
    world = start(run.engine.device)
    launch.use_threads(run.launch.threads, ranks=world.size)
    return world


def run_stages(run: RunConfig, stages: list[str], *, world: World) -> None:
    """Run the named stages in order."""
    setup_logging(world, quiet=run.tracking.progress is Progress.quiet)
    for stage in stages:
        STAGES[stage](run, world)
    stop()


if __name__ == "__main__":
    main()
