"""The front door of SFT -> reward model -> PPO: a command line is checked and composed, once, and becomes a run.

What then happens is told in `stages/pipeline.py`: the chosen stages run in order, those that are finished are skipped,
and a table says what was learnt. With `launch.ranks=N` each stage runs on N processes; under torchrun on those it
started. With `-m` in front, a setting with several values becomes several runs (`stages/setup/sweep.py`).

    python run_pipeline.py                       the whole pipeline on the embedded model and data
    python run_pipeline.py stage=sft             one stage
    python run_pipeline.py engine=zero3 launch.ranks=2
    python run_pipeline.py engine.deepspeed=ds_config.json
    python run_pipeline.py -m stage=sft sft.optimizer.lr=1e-4,3e-4
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from rlhf.runtime.parent import end_with_launcher

end_with_launcher()  # before the imports, which take seconds

# Read when torch and the tokenizers are imported. Threads that spin while they wait stall a machine that is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rlhf.tracking.provenance import remember_command
from stages.setup.command_line import check_overrides, one_sentence, overridden_keys, prepared
from stages.setup.compose import CONF_DIR, register_schema, to_run
from stages.setup.sweep import run_sweep

_MULTIRUN = ("-m", "--multirun")
_SCRIPT = Path(__file__).resolve()


def main() -> None:
    """Run what the command line asks for; mistakes in it and interruptions end with one sentence, not a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        start_or_work(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(1 if "RANK" in os.environ else "interrupted before anything was done")


def start_or_work(words: list[str]) -> None:
    """Start a run or several, be one of the ranks that a run has started, or leave to hydra what is a question to it.

    Torch and what is built on it are imported by those who need them: they take longer than `--help` or a refusal may.
    """
    if words[:1] == ["--worker"]:
        from stages.pipeline import work

        work(Path(words[1]), words[2:])
        return
    options = {word for word in words if word.startswith("-")}
    if options and options.issubset(_MULTIRUN):
        with one_sentence():
            run_sweep([word for word in words if word not in _MULTIRUN], script=_SCRIPT)
        return
    if not options:
        with one_sentence():
            check_overrides(words)
    remember_command()
    register_schema()
    sys.argv[1:] = prepared(words)
    compose_and_start()


@hydra.main(version_base=None, config_path=CONF_DIR, config_name="config")
def compose_and_start(config: DictConfig) -> None:
    """Compose once, and run."""
    with one_sentence():
        run = to_run(config)
    from stages.pipeline import run_here

    run_here(run, words=overridden_keys(HydraConfig.get().overrides.task), script=_SCRIPT)


if __name__ == "__main__":
    main()
