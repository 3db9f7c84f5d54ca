"""Every command of the README does what it says, at smoke size."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
INSTALLING = ("python3 -m venv", "pip install", "pytest", "make test")
"""What makes the environment that this very test runs in."""
SMALL = ["experiment=smoke", "sft.max_steps=2", "reward.max_steps=2", "ppo.iterations=1", "tracking.report=false"]


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def test_the_readme_starts_with_two_commands():
    assert [command.split(" ")[:2] for command in commands()[:2]] == [["make", "run"], ["make", "test"]]


def test_the_readme_is_a_page_and_not_a_book():
    assert len((ROOT / "README.md").read_text().splitlines()) < 250


def different(lines):
    """Those that are not the same at smoke size."""
    return {line.replace(" experiment=smoke", ""): line for line in lines}.values()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The run that is evaluated: its stages are made by the first command that needs them."""
    return tmp_path_factory.mktemp("evaluated")


@pytest.mark.parametrize("command", different(line for line in commands() if not line.startswith(INSTALLING)))
def test_command_works(command, tmp_path, evaluated):
    model, folder = tmp_path / "model", evaluated if ",eval]" in command else tmp_path
    words = [word.replace("MODEL", str(model)) for word in shlex.split(command)]
    if words[0] == "make":
        words += [f"VENV={sys.prefix}", f"ARGS=stage=sft {' '.join(SMALL[:2])} output_dir={folder}"]
    elif "experiment=custom" in words:
        words += own_files(tmp_path, model)
    elif any(word.endswith("run_pipeline.py") for word in words):
        chosen = [word for word in words if word.startswith("stage=")]
        selected = chosen[0] if chosen else "sft reward ppo"
        small = [word for word in SMALL if word.split(".")[0] in f"{selected} tracking" or word == SMALL[0]]
        words += [*small, f"output_dir={folder}", f"data.cache_dir={folder.parent / 'tokens'}"]
    tools = Path(sys.executable).parent
    program = {"python": sys.executable, "torchrun": str(tools / "torchrun")}.get(words[0], words[0])
    done = subprocess.run(
        [program, *words[1:]], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def own_files(folder, model):
    """A model and data of the user's, and sizes that suit them."""
    from rlhf.config import Embedded
    from rlhf.models.embedded import prepare

    prepare(Embedded.tiny, model)
    lines = {
        "demonstrations": '{"prompt": "a", "completion": " b"}\n',
        "preferences": '{"prompt": "a", "chosen": " b", "rejected": " c"}\n',
        "prompts": '{"prompt": "a"}\n',
    }
    for name, line in lines.items():
        (folder / f"{name}.jsonl").write_text(line * 40)
    files = {"sft": "demonstrations", "reward": "preferences", "ppo": "prompts"}
    overrides = [f"data.{stage}.train=[{folder / name}.jsonl]" for stage, name in files.items()]
    sizes = ["ppo.rollout_size=8", "ppo.minibatch_size=8", "ppo.max_response_tokens=4", "ppo.eval_prompts=2"]
    steps = ["sft.max_steps=1", "reward.max_steps=1", "ppo.iterations=1"]
    return [*overrides, *sizes, *steps, f"output_dir={folder / 'out'}"]
