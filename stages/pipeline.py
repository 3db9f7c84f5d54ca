"""Runs a composed configuration: checks it, then runs its stages here, on ranks that it starts, or under torchrun.

Finished stages are skipped. See also: `stages/setup/command_line.py`, and `stages/setup/sweep.py` for several runs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from rlhf.config.run_config import ProgressDisplay, RunConfig
from rlhf.deepspeed.apply import with_deepspeed
from rlhf.memory_plan.plan_text import check_memory, show_plan
from rlhf.models.fp32_matmul import multiply_with_mkl
from rlhf.runtime import launch
from rlhf.runtime.cluster_env import check_tasks
from rlhf.runtime.cores import use_cores
from rlhf.runtime.dist import World, broadcast_object, start, stop
from rlhf.runtime.errors import RunError
from rlhf.runtime.process import free_models
from rlhf.tracking.console import setup_logging
from rlhf.tracking.provenance import record_start
from stages.lifecycle.checkpointing import Stopped
from stages.lifecycle.stage_record import is_finished, lock_folder
from stages.lifecycle.summary import show_results, show_start, where_it_stands, write_report
from stages.setup.command_line import one_sentence
from stages.setup.compare_hosts import check_shared, compare_hosts
from stages.setup.compatibility import check_made
from stages.setup.compose import from_yaml, load_run, save_run, to_yaml
from stages.setup.preflight import preflight

WORKER = "--worker"


def run_here(run: RunConfig, *, overridden: set[str], script: Path) -> None:
    """Check everything, then run the selected stages.

    Args:
        run: the composed configuration.
        overridden: dotted names of the settings given on the command line.
        script: the program that started ranks run, with `WORKER` as its first argument.
    """
    with one_sentence():
        check_tasks(os.environ, ranks=run.launch.ranks)
        world = start_rank(run) if launch.under_torchrun() else World.alone()
        setup_logging(world, quiet=run.tracking.progress is ProgressDisplay.quiet)
        compare_hosts(run, world)
        ranks = world.size if launch.under_torchrun() else run.launch.ranks
        if world.is_main:
            run = with_deepspeed(run, ranks=ranks, overridden=overridden)
        run = from_yaml(broadcast_object(to_yaml(run)))  # every rank uses the first one's
        if run.plan:
            show_plan(run, world, ranks=ranks)
            return
        if run.chat is not None:
            from stages.chat import check_chat

            check_chat(run, ranks=world.size)
    with one_sentence(RunError, folder=run.output_dir):
        # Chat alone writes nothing and takes no lock, so it works while a run is going on in the folder.
        if run.stages or run.uses != ["chat"]:
            run_unfinished(run, world=world, ranks=ranks, script=script)
    if run.chat is not None:
        from stages.chat import run_chat

        with one_sentence(folder=run.output_dir):
            run_chat(run)


def run_worker(path: Path, stages: list[str]) -> None:
    """Run `stages` as one of the ranks that another process has started."""
    run = load_run(path)
    with contextlib.suppress(Stopped):  # the process that started us sees which stages are unfinished
        run_stages(run, stages, world=start_rank(run))


def run_unfinished(run: RunConfig, *, world: World, ranks: int, script: Path) -> None:
    """Run the unfinished stages with the output folder locked, and show the results."""
    with one_sentence():
        lock = lock_folder(run) if world.is_main else None
        check_shared(run, world)
        todo = broadcast_object(stages_to_run(run, ranks) if world.is_main else [])
    if todo:
        run_on_ranks(run, todo, world=world, ranks=ranks, script=script)
    if lock is not None:
        show_results(run)
        lock.close()


def run_on_ranks(run: RunConfig, todo: list[str], *, world: World, ranks: int, script: Path) -> None:
    """Run the stages in this process or on ranks started here; an interruption ends with how to resume."""
    path = save_run(run) if world.is_main else None
    try:
        if ranks == world.size:
            run_stages(run, todo, world=world if world.size > 1 else start_rank(run))
            return
        problem = launch.run_ranks(script, WORKER, str(path), *todo, launch=run.launch)
        if problem:
            sys.exit(f"{problem}; {where_it_stands(run)}")
        if not all(is_finished(run, stage) for stage in todo if stage in run.stages):
            raise KeyboardInterrupt  # the signal has reached the ranks alone
    except KeyboardInterrupt:
        sys.exit(f"interrupted: {where_it_stands(run)}" if world.is_main else 1)


def stages_to_run(run: RunConfig, ranks: int) -> list[str]:
    """Run all checks; returns the stages that are left to do."""
    show_start(run)
    todo = preflight(run, ranks=ranks)
    if todo:
        for stage in todo:
            stage_function(stage)  # what the process takes without a model contains its modules
        check_memory(run, todo, ranks=ranks)
    return [*todo, *(use for use in run.uses if use != "chat")]


def start_rank(run: RunConfig) -> World:
    """Join the process group and take this rank's share of the cores."""
    world = start(run.engine.device, launch=run.launch)
    setup_logging(world, quiet=run.tracking.progress is ProgressDisplay.quiet)
    use_cores(world, run.launch)
    return world


def run_stages(run: RunConfig, stages: list[str], *, world: World) -> None:
    """Run the named stages in order, on every rank."""
    setup_logging(world, quiet=run.tracking.progress is ProgressDisplay.quiet)
    try:
        with one_sentence(RunError, folder=run.output_dir):
            if world.is_main:
                record_start(Path(run.output_dir), ranks=world.size, device=world.device)
            for stage in stages:
                check_made(run, stage, made=stages, world=world)
                run_stage(run, stage, world=world)
    except Stopped:  # raised on all ranks alike, so the process group can still be closed
        stop()
        raise
    stop()


def stage_function(stage: str) -> Callable[[RunConfig, World], object]:
    """The function that runs a stage, such as `run_sft` of `stages/sft.py`; other stages are not imported."""
    function: Callable[[RunConfig, World], object] = getattr(import_module(f"stages.{stage}"), f"run_{stage}")
    return function


def run_stage(run: RunConfig, stage: str, *, world: World) -> None:
    """Run one stage, and write its report even if it failed."""
    free_models()  # of the stage before
    multiply_with_mkl()  # until a model of this stage is better off otherwise, whatever stages came before
    try:
        stage_function(stage)(run, world)
    except Exception:
        report_stage(run, stage, world=world)
        raise
    report_stage(run, stage, world=world)


def report_stage(run: RunConfig, stage: str, *, world: World) -> None:
    """Write the report of one stage, on the first rank."""
    if world.is_main:
        write_report(run, Path(run.folder(stage)))
