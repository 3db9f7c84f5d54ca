"""Entry point of the pipeline SFT -> reward model -> PPO: checks and composes the command line once, then runs it.

`stages/pipeline.py` runs the chosen stages in order, skips finished ones and prints the results. With `launch.ranks=N`
each stage runs on N processes, under torchrun on the ones it started. With `-m` in front, a setting with several values
becomes several runs (`stages/setup/sweep.py`).

    python run_pipeline.py                       the whole pipeline on the embedded model and data
    python run_pipeline.py stage=sft             one stage
    python run_pipeline.py engine=zero3 launch.ranks=2
    rlhf-pipeline --num_gpus 2 engine=zero3      the same, after `pip install`, with DeepSpeed's flags
    python run_pipeline.py engine.deepspeed=ds_config.json
    python run_pipeline.py -m stage=sft sft.optimizer.lr=1e-4,3e-4
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path

_SCRIPT = Path(__file__).resolve()
if sys.path[0] != str(_SCRIPT.parent):  # started as a command or a module: a user's folder `data` must not hide ours
    started_in = [sys.path.pop(0)] if sys.path[0] == str(Path.cwd()) else []
    sys.path += [str(_SCRIPT.parent), *started_in]

from rlhf.runtime.process import VARIABLES, end_with_launcher

end_with_launcher()  # before the imports, which take seconds

for name, value in VARIABLES.items():
    os.environ.setdefault(name, value)

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rlhf.config.run_config import RunConfig
from rlhf.runtime.cluster_env import rank_variables
from rlhf.runtime.deepspeed_flags import apply_flags, has_flags, read_flags
from rlhf.tracking.provenance import remember_command
from stages.setup.command_line import check_overrides, one_sentence, overridden_keys, prepared
from stages.setup.compose import CONF_DIR, register_schema, to_run
from stages.setup.sweep import run_sweep

_PROGRAM = [sys.argv[0]] if sys.argv[0].endswith(".py") else ["-m", "run_pipeline"]
"""How torchrun starts this program: as a file, or, after `pip install`, as a module."""
_MULTIRUN = ("-m", "--multirun")


def main() -> None:
    """Run what the command line asks for; mistakes in it and interruptions end with one sentence, not a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.stderr and not faulthandler.is_enabled():
        faulthandler.enable()  # a crash in a library prints where each thread was
    try:
        start_or_work(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(1 if "RANK" in os.environ else "interrupted before anything was done")


def start_or_work(words: list[str]) -> None:
    """Start one run or several, run as a started rank, or hand questions such as `--help` to hydra.

    Torch and the modules that need it are imported later: `--help` and refusals must not wait for them.
    """
    if words[:1] == ["--worker"]:
        from stages.pipeline import run_worker

        run_worker(Path(words[1]), words[2:])
        return
    with one_sentence():
        os.environ |= rank_variables(os.environ)
        if has_flags(words):
            words = apply_flags(read_flags(words), program=_PROGRAM)
    options = {word for word in words if word.startswith("-")}
    if options and options.issubset(_MULTIRUN):
        with one_sentence():
            run_sweep([word for word in words if word not in _MULTIRUN], script=_SCRIPT)
        return
    remember_command()
    if options:
        register_schema()
        sys.argv[1:] = prepared(words)
        compose_and_start()
        return
    with one_sentence():
        run = check_overrides(words)
    start(run, prepared(words))


@hydra.main(version_base=None, config_path=CONF_DIR, config_name="config")
def compose_and_start(config: DictConfig) -> None:
    """Run a configuration for which hydra was given options; those that ask a question end before this."""
    with one_sentence():
        run = to_run(config)
    start(run, HydraConfig.get().overrides.task)


def start(run: RunConfig, overrides: list[str]) -> None:
    """Run a configuration that these overrides have made."""
    from stages.pipeline import run_here

    run_here(run, overridden=overridden_keys(overrides), script=_SCRIPT)


if __name__ == "__main__":
    main()
