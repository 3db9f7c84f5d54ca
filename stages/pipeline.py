"""A composed run, from its checks to its last table: here, on ranks that we start, or on those that torchrun started.

Finished stages are skipped. Left out: the command line (`command_line.py`), and several runs (`sweep.py`).
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from rlhf.config.run_config import RunConfig
from rlhf.config.tracking_config import Progress
from rlhf.memory_plan.plan_text import check_memory, show_plan
from rlhf.runtime import launch
from rlhf.runtime.dist import World, broadcast_object, start, stop
from rlhf.runtime.errors import RunError
from rlhf.tracking.console import setup_logging
from rlhf.tracking.provenance import note_start
from stages.chat import check_chat, run_chat
from stages.eval import run_eval
from stages.lifecycle.signals import Stopped
from stages.lifecycle.stage_record import check_shared, is_finished, lock_folder
from stages.lifecycle.summary import show_results, where_it_stands, write_report
from stages.ppo import run_ppo
from stages.reward import run_reward
from stages.setup.command_line import one_sentence
from stages.setup.compatibility import check_made
from stages.setup.compose import from_yaml, load_run, save_run, to_yaml
from stages.setup.deepspeed_settings import with_deepspeed
from stages.setup.preflight import preflight
from stages.sft import run_sft

STAGES = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo, "eval": run_eval}
WORKER = "--worker"


def run_here(run: RunConfig, *, words: set[str], script: Path) -> None:
    """Check everything, and run what is selected.

    Args:
        run: what is to be done.
        words: dotted names of the settings that the command line gives.
        script: what the ranks that we start are to run, with `WORKER`.
    """
    with one_sentence():
        world = start_rank(run) if launch.under_torchrun() else World.alone()
        setup_logging(world, quiet=run.tracking.progress is Progress.quiet)
        ranks = world.size if launch.under_torchrun() else run.launch.ranks
        if world.is_main:
            run = with_deepspeed(run, ranks=ranks, overridden=words)
        run = from_yaml(broadcast_object(to_yaml(run)))  # that of the first rank
        if run.plan:
            show_plan(run, world, ranks=ranks)
            return
        if run.chat is not None:
            check_chat(run, ranks=world.size)
    with one_sentence(RunError, folder=run.output_dir):
        if run.stages or run.uses != ["chat"]:  # a chat alone writes nothing, and may be about a run that is going on
            make(run, world=world, ranks=ranks, script=script)
    if run.chat is not None:
        with one_sentence(folder=run.output_dir):
            run_chat(run)


def work(path: Path, stages: list[str]) -> None:
    """Be one of the ranks that a run has started."""
    run = load_run(path)
    with contextlib.suppress(Stopped):  # whoever started us sees what is not finished
        run_stages(run, stages, world=start_rank(run))


def make(run: RunConfig, *, world: World, ranks: int, script: Path) -> None:
    """Run the stages that are left, alone in the output folder, and show what is in it."""
    with one_sentence():
        lock = lock_folder(run) if world.is_main else None
        check_shared(run)
        todo = broadcast_object(checked(run, ranks) if world.is_main else [])
    if todo:
        carry_out(run, todo, world=world, ranks=ranks, script=script)
    if lock is not None:
        show_results(run)
        lock.close()


def carry_out(run: RunConfig, todo: list[str], *, world: World, ranks: int, script: Path) -> None:
    """Run the stages, here or on ranks that we start; an interruption ends the program with where the run stands."""
    path = save_run(run) if world.is_main else None
    try:
        if ranks == world.size:
            run_stages(run, todo, world=world if world.size > 1 else start_rank(run))
            return
        problem = launch.run_ranks(script, WORKER, str(path), *todo, launch=run.launch)
        if problem:
            sys.exit(f"{problem}; {where_it_stands(run)}")
        if not all(is_finished(run, stage) for stage in todo if stage in run.stages):
            raise KeyboardInterrupt  # that reached the ranks alone
    except KeyboardInterrupt:
        sys.exit(f"interrupted: {where_it_stands(run)}" if world.is_main else 1)


def checked(run: RunConfig, ranks: int) -> list[str]:
    """What is left to do, after everything that can be wrong with it has been looked for."""
    todo = preflight(run, ranks=ranks)
    if todo:
        check_memory(run, todo, ranks=ranks)
    return [*todo, *(use for use in run.uses if use in STAGES)]


def start_rank(run: RunConfig) -> World:
    """Join the other ranks and share the cores with them."""
    world = start(run.engine.device, launch=run.launch)
    launch.use_threads(run.launch.threads, ranks=launch.local_ranks(world.size))
    return world


def run_stages(run: RunConfig, stages: list[str], *, world: World) -> None:
    """Run the named stages in order."""
    setup_logging(world, quiet=run.tracking.progress is Progress.quiet)
    try:
        with one_sentence(RunError, folder=run.output_dir):
            if world.is_main:
                note_start(Path(run.output_dir), ranks=world.size, device=world.device)
            for stage in stages:
                check_made(run, stage, made=stages, world=world)
                run_stage(run, stage, world=world)
    except Stopped:  # on all ranks alike: they can still say good-bye
        stop()
        raise
    stop()


def run_stage(run: RunConfig, stage: str, *, world: World) -> None:
    """Run one stage, and report on it, also where it could not go on."""
    try:
        STAGES[stage](run, world)
    except Exception:
        report_stage(run, stage, world=world)
        raise
    report_stage(run, stage, world=world)


def report_stage(run: RunConfig, stage: str, *, world: World) -> None:
    """Write the report of one stage, on the main rank."""
    if world.is_main:
        write_report(run, Path(run.folder(stage)))
