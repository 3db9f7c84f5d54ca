"""The table of contents: SFT -> reward model -> PPO.

The configuration is composed once; then the chosen stages run in order, those that are finished are skipped, and a
table says what was learnt. With `launch.ranks=N` each stage runs on N processes; under torchrun on those it started.

    python run_pipeline.py                       the whole pipeline on the embedded model and data
    python run_pipeline.py stage=sft             one stage
    python run_pipeline.py engine=zero3 launch.ranks=2
    python run_pipeline.py engine.deepspeed=ds_config.json
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.parent import end_with_launcher

end_with_launcher()  # before the imports, which take seconds

# Read when torch and the tokenizers are imported. Threads that spin while they wait stall a machine that is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rlhf import launch
from rlhf.config import Progress, RunConfig
from rlhf.dist import World, broadcast_object, start, stop
from rlhf.failure import RunError, keep_traceback, sentence_of
from rlhf.tracking.console import setup_logging
from rlhf.tracking.origin import note_start, remember_command
from rlhf.tracking.table import printable
from stages.chat import check_chat, run_chat
from stages.compatibility import check_made
from stages.composition import (
    CONF_DIR,
    check_overrides,
    from_first_rank,
    load_run,
    overridden_keys,
    register_schema,
    save_run,
    to_run,
)
from stages.deepspeed import with_deepspeed
from stages.evaluate import run_eval
from stages.handover import check_shared, is_finished, lock_folder
from stages.planning_report import check_memory, show_plan
from stages.ppo import run_ppo
from stages.preflight import preflight
from stages.results import show_results, where_it_stands, write_report
from stages.reward import run_reward
from stages.sft import run_sft
from stages.stopping import Stopped

STAGES = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo, "eval": run_eval}
_WORKER = "--worker"


def main() -> None:
    """Run what the command line asks for; mistakes in it and interruptions end with one sentence, not a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        start_or_work()
    except KeyboardInterrupt:
        sys.exit(1 if launch.under_torchrun() else "interrupted before anything was done")


def start_or_work() -> None:
    """Start a run, or be one of the ranks that a run has started."""
    if sys.argv[1:2] == [_WORKER]:
        run = load_run(Path(sys.argv[2]))
        with contextlib.suppress(Stopped):  # whoever started us sees what is not finished
            run_stages(run, sys.argv[3:], world=start_rank(run))
        return
    remember_command()
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
        words = overridden_keys(HydraConfig.get().overrides.task)
        run = from_first_rank(with_deepspeed(run, ranks=ranks, overridden=words) if world.is_main else run)
        if run.plan:
            show_plan(run, world, ranks=ranks)
            return
        if run.chat is not None:
            check_chat(run, ranks=world.size)
    with one_sentence(RunError, folder=run.output_dir):
        if run.stages or run.uses != ["chat"]:  # a chat alone writes nothing, and may be about a run that is going on
            make(run, world=world, ranks=ranks)
    if run.chat is not None:
        with one_sentence(folder=run.output_dir):
            run_chat(run)


def make(run: RunConfig, *, world: World, ranks: int) -> None:
    """Run the stages that are left, alone in the output folder, and show what is in it."""
    with one_sentence():
        lock = lock_folder(run) if world.is_main else None
        check_shared(run)
        todo = broadcast_object(checked(run, ranks) if world.is_main else [])
    if todo:
        carry_out(run, todo, world=world, ranks=ranks)
    if lock is not None:
        show_results(run)
        lock.close()


def carry_out(run: RunConfig, todo: list[str], *, world: World, ranks: int) -> None:
    """Run the stages, here or on ranks that we start; an interruption ends the program with where the run stands."""
    path = save_run(run) if world.is_main else None
    try:
        if ranks == world.size:
            run_stages(run, todo, world=world if world.size > 1 else start_rank(run))
            return
        problem = launch.run_ranks(Path(__file__), _WORKER, str(path), *todo, launch=run.launch)
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


@contextmanager
def one_sentence(kind: type[Exception] = ValueError, *, folder: str | None = None) -> Iterator[None]:
    """End the program with what an error has to say to the user; a mistake in the program keeps its traceback.

    Args:
        kind: errors that are always for the user, beside those that `sentence_of` knows.
        folder: where the traceback goes; HYDRA_FULL_ERROR=1 shows it instead.
    """
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, kind) else sentence_of(error)
        if said is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        note = keep_traceback(error, Path(folder)) if folder and Path(folder).is_dir() else ""
        sys.exit("\n".join(map(printable, f"error: {said}{note}".split("\n"))))


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
        write_report(run, Path(run.output_dir) / stage)


if __name__ == "__main__":
    main()
