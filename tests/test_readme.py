"""The README's commands do what it says, as they are printed and one after another in one checkout, at smoke size."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.forking import make_programs

ROOT = Path(__file__).parents[1]
INSTALLING = ("python3 -m venv", "pip install", "pytest", "make test")
"""What makes the environment that this very test runs in."""
SMALL = {"sft": "sft.max_steps=2", "reward": "reward.max_steps=2", "dpo": "dpo.max_steps=2", "ppo": "ppo.iterations=1"}
GLOBS = set("[]*?(){}<>|&;#~^!$`\\")


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip()]


def test_the_readme_starts_with_two_commands():
    assert [command.split(" ")[:2] for command in commands()[:2]] == [["make", "run"], ["make", "test"]]


def file_table():
    """The block of the README that has one line for each file."""
    return re.search(r"```\nrun_pipeline\.py .*?```", (ROOT / "README.md").read_text(), re.DOTALL)[0]


def test_the_readme_is_a_page_and_not_a_book():
    assert len((ROOT / "README.md").read_text().replace(file_table(), "").splitlines()) < 250


def test_every_file_has_one_line_that_says_what_it_holds():
    listed, folder = [], ""
    for line in file_table().splitlines()[1:-1]:
        indented, name, about = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        folder = folder if indented else name
        if indented:
            listed.append(folder + name)
            assert len(about.split()) > 2, line
    files = [file for room in ("rlhf", "stages", "data") for file in (ROOT / room).rglob("*.py")]
    assert sorted(listed) == sorted(str(file.relative_to(ROOT)) for file in files if file.name != "__init__.py")


@pytest.mark.parametrize("command", [line for line in commands() if not line.startswith(INSTALLING)])
def test_no_shell_reads_a_command_otherwise_than_it_is_meant(command):
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", command)
    assert GLOBS.isdisjoint(unquoted), "zsh, which takes no # for a comment and looks for files, would refuse it"
    for shell in filter(shutil.which, ["bash", "zsh"]):
        program = ["-f"] if shell == "zsh" else ["--norc"]
        done = subprocess.run(
            [shell, *program, "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True
        )
        assert done.stdout.split("\0")[:-1] == shlex.split(command)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a fresh checkout looks like, with an environment that `make` finds installed."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ("run_pipeline.py", "Makefile", "pyproject.toml", "rlhf", "stages", "data", "conf", "examples"):
        (folder / entry).symlink_to(ROOT / entry)
    make_programs(folder / ".venv/bin", torchrun="-m torch.distributed.run")
    (folder / ".venv/installed").touch()
    return folder


@pytest.mark.parametrize("command", [line for line in commands() if not line.startswith(INSTALLING)])
def test_commands_work_one_after_another(command, checkout):
    done = subprocess.run(
        ["bash", "-c", smaller(command, checkout)],
        cwd=checkout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{checkout}/.venv/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    named = re.search(r"name=(\w+)", command)
    if named:
        assert "skipping it" not in done.stderr, "an earlier command has made the folder"
        folder = checkout / "outputs" / named[1]
        runs = list(folder.glob("*/")) if " -m " in command else [folder]
        assert all((run / "sft/model").is_dir() for run in runs)
        assert len(runs) == 1 or (folder / "index.html").exists()


def smaller(command, checkout):
    """The command as it is printed, with words behind it that make its stages small."""
    cache = f"data.cache_dir={checkout}/tokens"
    if command.startswith("make"):
        return f"{command} ARGS='experiment=smoke name=made stage=sft sft.max_steps=2 {cache}'"
    if "plan=true" in command:
        return command
    # Commands that name no experiment show that there are reports.
    words = [cache, *(["tracking.report=false"] if "experiment=" in command else ["experiment=smoke", "name=default"])]
    if "experiment=custom" in command:
        command = command.replace("MODEL", str(own_files(checkout)))
        words += ["ppo.rollout_size=8", "ppo.minibatch_size=8", "ppo.max_response_tokens=4", "ppo.eval_prompts=2"]
    chosen = re.search(r"stage=\[?([\w,]+)", command)
    stages = re.sub("grpo|ppo_lora", "ppo", chosen[1]).split(",") if chosen else ["sft", "reward", "ppo"]
    return " ".join([command, *words, *(SMALL[stage] for stage in stages if stage in SMALL)])


def own_files(folder):
    """A model and data of the user's in the working directory."""
    from rlhf.config.run_config import Embedded
    from rlhf.models.embedded import prepare

    prepare(Embedded.tiny, folder / "model")
    lines = {
        "demonstrations": '{"prompt": "a", "completion": " b"}\n',
        "preferences": '{"prompt": "a", "chosen": " b", "rejected": " c"}\n',
        "prompts": '{"prompt": "a"}\n',
    }
    for name, line in lines.items():
        (folder / f"{name}.jsonl").write_text(line * 40)
    return folder / "model"
