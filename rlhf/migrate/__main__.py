"""The command `python -m rlhf.migrate deepspeed-chat|trl COMMAND`: prints the command here that does the same.

python -m rlhf.migrate deepspeed-chat "deepspeed main.py --data_path Dahoas/rm-static --zero_stage 3 --offload"
python -m rlhf.migrate deepspeed-chat run_1.3b.sh ./output 2 --ranks 8
python -m rlhf.migrate trl "trl sft --config sft.yaml --learning_rate 1e-5"
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlhf.migrate.flags import Fate, Peer, page, peer
from rlhf.migrate.shell import commands
from rlhf.migrate.translate import translate
from rlhf.migrate.translation import Translation, override, scalar

STEPS = {"step1": "sft", "step2_dpo": "dpo", "step2": "reward", "step3": "ppo", "chat.py": "chat"}
"""Parts of paths of DeepSpeed-Chat -> its steps."""
SCRIPTS = {"sft": "sft", "reward": "reward", "dpo": "dpo", "grpo": "grpo"}
"""First words of scripts and subcommands of TRL -> steps."""
ELSEWHERE = {"vlm", "online", "diffusion", "agent"}
"""Further words of scripts whose trainers or models are not here."""


def main() -> None:
    """Print the page, or the translation of every command that was given."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.migrate", description="The command here that does the same.")
    parser.add_argument("peer", choices=["deepspeed-chat", "trl", "docs"])
    parser.add_argument("command", nargs="*", help="a command in quotes, or a script and its arguments")
    parser.add_argument("--step", help="sft, reward, dpo, ppo, chat; or grpo: where the command does not tell")
    parser.add_argument("--ranks", type=int, help="devices in all, where the command does not tell")
    parser.add_argument("--rows", type=int, help="rows of the training data, which the length of PPO follows from")
    given = parser.parse_args()
    if given.peer == "docs":
        sys.stdout.write(page(resources.files("rlhf.migrate").joinpath("page.md").read_text("utf-8")))
        return
    try:
        for found in translations(peer(given.peer), given.command, step=given.step, ranks=given.ranks, rows=given.rows):
            sys.stdout.write(described(found))
    except (OSError, ValueError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")


def translations(
    project: Peer, words: list[str], *, step: str | None = None, ranks: int | None = None, rows: int | None = None
) -> list[Translation]:
    """The translation of each command in `words`: one command, or a script and its arguments.

    Raises:
        ValueError: there is no command that can be translated, or it is not told which step it is of.
    """
    can_be_file = words and all(len(part.encode()) < 256 for part in words[0].split("/"))  # else `stat` raises
    file = Path(words[0]) if can_be_file and Path(words[0]).is_file() else None
    text = file.read_text("utf-8") if file else " ".join(words)
    found = commands(text, words[1:] if file else ())
    if not found:
        raise ValueError("found no command that starts a training, such as deepspeed main.py ... or trl sft ...")
    place = str(file.resolve()) if file else ""
    return [_translation(project, command, place=place, step=step, ranks=ranks, rows=rows) for command in found]


def _translation(
    project: Peer, words: list[str], *, place: str, step: str | None, ranks: int | None, rows: int | None
) -> Translation:
    launch, program, rest = _split(words)
    told = step or _step_of(project, program, place=place, rest=rest)
    if told not in project.steps:
        raise ValueError(f"{program}: found step {told!r}; expected one of {', '.join(project.steps)} (--step).")
    flags = project.steps[told]
    given = _values(rest, flags) | _values(launch, flags)
    if "config" in given:
        file = next((f for f in (Path(given["config"]), Path(place).parent / given["config"]) if f.is_file()), None)
        if file is None:
            raise ValueError(f"--config {given['config']}: no such file; its settings are needed.")
        head = yaml.safe_load(file.read_text("utf-8"))
        if not isinstance(head, dict):
            raise ValueError(f"--config {file}: found {type(head).__name__}; expected NAME: VALUE, as TRL reads.")
        given = {str(name): value for name, value in head.items() if name != "env"} | given
    counted = ranks or _devices(given)
    translation = translate(project, given, step=told, ranks=counted or 1, rows=rows)
    if not step and project.name == "deepspeed-chat" and not any(part in f"{place}/{program}" for part in STEPS):
        translation.notes.append(f"taken for the step {told} by its flags; --step names another")
    if counted is None:
        translation.notes.append("devices are not counted: the batch is that of one; say --ranks N for N of them")
    if _nodes(given) > 1:
        translation.settings.pop("launch.ranks", None)
        translation.notes.append(
            f"on {_nodes(given)} machines, start it on each with torchrun; the batch counts all devices"
        )
    return translation


class _Command(NamedTuple):
    """A command in its parts."""

    launcher: list[str]
    program: str  # or a subcommand
    words: list[str]


def _split(words: list[str]) -> _Command:
    """Words of the launcher, the program or subcommand, and its own words."""
    start = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
    if words[0].rpartition("/")[2] == "trl" and len(words) > 1:
        return _Command([], words[1], words[2:])
    if start is None:
        raise ValueError(f"{shlex.join(words)[:80]}: found no program; expected one such as main.py, or trl sft.")
    return _Command(words[1:start], words[start], words[start + 1 :])


def _step_of(project: Peer, program: str, *, place: str, rest: list[str]) -> str:
    if project.name == "trl":
        name, *others = [word for word in re.split("[_-]", Path(program).stem) if word not in ("train", "run")] or [""]
        if name not in SCRIPTS or set(others) & ELSEWHERE:
            raise ValueError(
                f"{program}: expected one of {', '.join(SCRIPTS)}; the other trainers of TRL are not here, and images "
                "neither. A script of your own is given with --step."
            )
        return SCRIPTS[name]
    if Path(program).name not in ("main.py", "chat.py"):
        raise ValueError(
            f"{program}: expected main.py or chat.py. e2e_rlhf.py starts the scripts of the steps, which can be given; "
            "stage=eval compares models here (eval.baseline)."
        )
    path = f"{place}/{program}"
    by_path = next((step for part, step in STEPS.items() if part in path), None)
    names = [word[2:].partition("=")[0] for word in rest if word.startswith("--")]
    unknown = {step: sum(name not in flags for name in names) for step, flags in project.steps.items()}
    return by_path or min(unknown, key=lambda step: unknown[step])  # the first of those that know most of the flags


def _values(words: list[str], flags: Any) -> dict[str, Any]:
    """The flags among `words` with their values, which are read by kind; `--no_NAME` is false."""
    values: dict[str, Any] = {}
    name, many = "", list[str]()
    for word in [*words, "--"]:
        if not word.startswith("--"):
            many.append(word)
            continue
        if name:
            values[name] = _value(many, flags.get(name))
        name, equals, value = word[2:].partition("=")
        name, many = name.replace("-", "_"), [value] * bool(equals)
        if name.startswith("no_") and name not in flags and name[3:] in flags:
            name, many = name[3:], ["false"]
    return values


def _value(words: list[str], flag: Any) -> Any:
    kind = flag.kind if flag else "text"
    if kind == "list":
        return [scalar(word) for word in words]
    if kind == "switch":
        return scalar(words[0]) if words else True
    if kind == "json" and words:
        return json.loads(words[0])
    has_value = flag is not None and flag.fate in (Fate.set, Fate.rule)
    return scalar(words[0]) if words else None if has_value else True


def _devices(given: dict[str, Any]) -> int | None:
    """How many devices the launcher was told to use, itself or by a file of Accelerate; None if it was not."""
    file = given.get("config_file")
    said = yaml.safe_load(Path(file).read_text("utf-8")) if isinstance(file, str) and Path(file).is_file() else {}
    everywhere = given.get("num_processes", said.get("num_processes") if isinstance(said, dict) else None)
    here = given.get("num_gpus", given.get("nproc_per_node"))
    if isinstance(everywhere, int):
        return everywhere
    return here * _nodes(given) if isinstance(here, int) else None


def _nodes(given: dict[str, Any]) -> int:
    found = next((given[name] for name in ("num_nodes", "num_machines", "nnodes") if name in given), 1)
    return found if isinstance(found, int) else 1


def command_of(found: Translation) -> list[str]:
    """The words of this project's command line, what is of the whole run first."""
    order = ["stage", "name", "output_dir", "seed", "launch", "model", "data", "engine"]
    names = sorted(found.settings, key=lambda name: (*order, name.split(".")[0]).index(name.split(".")[0]))
    return ["experiment=custom", *(override(name, found.settings[name].value) for name in names)]


def described(found: Translation) -> str:
    """The command, and below it where each setting comes from and what became of the other flags."""
    words = [shlex.quote(word) for word in command_of(found)]
    lines = [f"# {found.peer.name}, {found.step}", " \\\n    ".join(["python run_pipeline.py", *words]), ""]
    width = max(len(word) for word in command_of(found) if len(word) < 60)
    for title, is_default in (("from the command", False), ("theirs by default, or fixed there", True)):
        part = {word.partition("=")[0]: word for word in command_of(found)[2:]}
        part = {name: word for name, word in part.items() if found.settings[name].is_default is is_default}
        rows = [f"{word:{width}}  {found.settings[name].source}" for name, word in part.items()]
        lines += _section(title, rows)
    lines += _section("here by itself", found.reasons[Fate.itself])
    lines += _section("no counterpart", found.reasons[Fate.none])
    lines += _section("not recognised", found.unknown)
    return "\n".join([*lines, *_section("look at", found.notes), ""])


def _section(title: str, rows: list[str]) -> list[str]:
    return [f"{title}:", *(f"  {row}" for row in dict.fromkeys(rows)), ""] if rows else []


if __name__ == "__main__":
    main()
