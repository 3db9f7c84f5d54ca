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
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from rlhf.migrate.flags import Fate, Flag, Peer, page, peer
from rlhf.migrate.shell import commands
from rlhf.migrate.translate import translate
from rlhf.migrate.translation import Translation, override, scalar

PATHS = {"step1": "sft", "step2_dpo": "dpo", "step2": "reward", "step3": "ppo", "chat.py": "chat"}
"""Parts of paths of DeepSpeed-Chat -> its steps."""
SCRIPTS = {"sft": "sft", "reward": "reward", "dpo": "dpo", "ppo": "ppo", "grpo": "grpo", "gspo": "grpo", "rloo": "rloo"}
"""First words of scripts and subcommands of TRL -> steps."""
ELSEWHERE = {"vlm", "online", "diffusion", "agent"}
"""Further words of scripts whose trainers or models are not here."""
SWITCH = {"true": True, "t": True, "yes": True, "y": True, "1": True}
SWITCH |= {"false": False, "f": False, "no": False, "n": False, "0": False}
"""What Transformers reads as true or false."""


def main() -> None:
    """Print the page, or the translation of every command that was given."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.migrate", description="The command here that does the same.")
    parser.add_argument("peer", choices=["deepspeed-chat", "trl", "docs"])
    parser.add_argument("command", nargs="*", help="a command in quotes, or a script and its arguments")
    parser.add_argument("--step", help="sft, reward, dpo, ppo, grpo, rloo, chat: where the command does not tell")
    parser.add_argument("--ranks", type=int, help="devices in all, where the command does not tell")
    parser.add_argument("--rows", type=int, help="prompts of the training data, which the length of PPO follows from")
    given, others = parser.parse_known_intermixed_args()
    if others:
        parser.error(f"found {others[0]}; expected the whole command in one pair of quotes.")
    if given.peer == "docs":
        sys.stdout.write(page(resources.files("rlhf.migrate").joinpath("page.md").read_text("utf-8")))
        return
    if any(count is not None and count < 1 for count in (given.ranks, given.rows)):
        parser.error("--ranks and --rows: expected 1 or more.")
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
    if file and file.suffix == ".py":
        raise ValueError(f"{file}: the settings of a Python script are in its code; docs/trainer.md runs it as it is.")
    if file and file.suffix in (".yaml", ".yml"):
        raise ValueError(f"{file}: give the command that reads it, such as 'trl sft --config {file}'.")
    text = file.read_text("utf-8") if file else " ".join(words)
    found = commands(text, words[1:] if file else (), file=file)
    if not found:
        missing = f"{words[0]} is no file here, and " if re.fullmatch(r"\S+\.(sh|py|ya?ml)", text.strip()) else ""
        raise ValueError(f"{missing}there is no command that starts a training, such as deepspeed main.py or trl sft.")
    place = str(file.resolve()) if file else ""
    done, left_out = list[Translation](), list[str]()
    for command in found:
        try:
            done.append(_translation(project, command, place=place, step=step, ranks=ranks, rows=rows))
        except ValueError as error:  # a server, the download of data, ... beside the training
            left_out.append(str(error))
    if not done:
        raise ValueError(left_out[0])
    done[0].notes += [f"left out: {error}" for error in left_out]
    return done


def _translation(
    project: Peer, words: list[str], *, place: str, step: str | None, ranks: int | None, rows: int | None
) -> Translation:
    program = _program(words)
    launch, rest = words[1:program], words[program + 1 :]
    if rest and Path(rest[0]).suffix in (".yaml", ".yml", ".json"):
        rest.insert(0, "--config")
    if rest and not rest[0].startswith("--"):
        raise ValueError(f"{shlex.join(words[: program + 2])}: found {rest[0]}; expected a flag, --NAME.")
    told = step or _step_of(project, words[program], place=place, rest=rest)
    if told not in project.steps:
        raise ValueError(f"{words[program]}: found step {told!r}; expected one of {', '.join(project.steps)} (--step).")
    flag_of = partial(project.flag, told)
    given = _values(rest, flag_of) | {name: value for name, value in _values(launch, flag_of).items() if flag_of(name)}
    given = _config(given, place) | given
    nodes = next((n for n in map(given.get, ("num_nodes", "num_machines", "nnodes")) if isinstance(n, int)), 1)
    counted = ranks or _devices(given, nodes)
    translation = translate(project, given, step=told, ranks=counted or 1, rows=rows)
    if not step and project.name == "deepspeed-chat" and not any(part in f"{place}/{words[program]}" for part in PATHS):
        translation.notes.append(f"taken for the step {told} by its flags; --step names another")
    if counted is None:
        translation.notes.append("devices are not counted: the batch is that of one; say --ranks N for N of them")
    if nodes > 1:
        translation.settings.pop("launch.ranks", None)
        translation.notes.append(
            f"on {nodes} machines, start it on each with torchrun (docs/launching.md); the batch counts all devices"
        )
    return translation


def _config(given: dict[str, Any], place: str) -> dict[str, Any]:
    """What the file of --config says; its texts are read as those of the command line are."""
    if "config" not in given:
        return {}
    file = next((f for f in (Path(given["config"]), Path(place).parent / given["config"]) if f.is_file()), None)
    if file is None:
        raise ValueError(f"--config {given['config']}: no such file; its settings are needed.")
    read = {name: value for name, value in _mapping(file).items() if name != "env"}
    return {name: scalar(value) if isinstance(value, str) else value for name, value in read.items()}


def _mapping(file: Path) -> dict[str, Any]:
    found = yaml.safe_load(file.read_text("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{file}: found {type(found).__name__}; expected NAME: VALUE, as TRL and Accelerate read.")
    return {str(name): value for name, value in found.items()}


def _program(words: list[str]) -> int:
    """Where the program, module or subcommand is; before it are the launcher's words."""
    if words[0].rpartition("/")[2] == "trl" and len(words) > 1:
        return 1
    modules = (n for n, word in enumerate(words) if words[max(n - 1, 0)] in ("-m", "--module") and "launch" not in word)
    start = next((n for n, word in enumerate(words) if word.endswith(".py")), None) or next(modules, None)
    if start is None:
        raise ValueError(f"{shlex.join(words)[:80]}: found no program; expected one such as main.py, or trl sft.")
    return start


def _step_of(project: Peer, program: str, *, place: str, rest: list[str]) -> str:
    if project.name == "trl":
        stem = Path(program).stem if program.endswith(".py") else program.rpartition(".")[2]
        name, *others = [word for word in re.split("[_-]", stem) if word not in ("train", "run")] or [""]
        if name not in SCRIPTS or set(others) & ELSEWHERE:
            raise ValueError(
                f"{program}: expected one of {', '.join(SCRIPTS)}; the other trainers of TRL are not here, and images "
                "neither. A script of your own is given with --step."
            )
        return SCRIPTS[name]
    if Path(program).name not in ("main.py", "chat.py"):
        raise ValueError(
            f"{program}: expected main.py or chat.py. e2e_rlhf.py starts step*/training_scripts/opt/DEPLOYMENT-TYPE/"
            "run_SIZE.sh: give these one after another. stage=eval compares models here (eval.baseline)."
        )
    by_path = next((step for part, step in PATHS.items() if part in f"{place}/{program}"), None)
    names = [word[2:].partition("=")[0] for word in rest if word.startswith("--")]
    unknown = {step: sum(project.flag(step, name) is None for name in names) for step in project.steps}
    return by_path or min(unknown, key=lambda step: unknown[step])  # the first of those that know most of the flags


def _values(words: list[str], flag_of: Callable[[str], Flag | None]) -> dict[str, Any]:
    """The flags among `words` with their values, which are read by kind; `--no_NAME` is false."""
    values: dict[str, Any] = {}
    name, many = "", list[str]()
    for word in [*words, "--"]:
        if not word.startswith("--"):
            many.append(word)
            continue
        if name:
            values[name] = _value(f"--{name} {' '.join(many)}", many, flag=flag_of(name))
        name, equals, value = word[2:].partition("=")
        name, many = name.replace("-", "_"), [value] * bool(equals)
        if name.startswith("no_") and not flag_of(name) and flag_of(name[3:]):
            name, many = name[3:], ["false"]
    return values


def _value(written: str, words: list[str], *, flag: Flag | None) -> Any:
    kind = flag.kind if flag else "text"
    if kind == "list":
        return [scalar(word.rstrip(",")) for word in words]
    if kind == "switch":
        if len(words) > 1 or (words and words[0].lower() not in SWITCH):
            raise ValueError(f"{written}: expected true or false, or nothing.")
        return SWITCH[words[0].lower()] if words else True
    if flag and flag.fate in (Fate.set, Fate.rule):
        if len(words) > 1:
            raise ValueError(f"{written}: expected one value.")
        return (json.loads if kind == "json" else scalar)(words[0]) if words else None
    return scalar(words[0]) if words else True


def _devices(given: dict[str, Any], nodes: int) -> int | None:
    """How many devices the launcher was told to use, itself or by a file of Accelerate; None if it was not."""
    file = given.get("config_file", given.get("accelerate_config"))
    said = _mapping(Path(file)) if isinstance(file, str) and Path(file).is_file() else {}
    everywhere = given.get("num_processes", said.get("num_processes"))
    here = given.get("num_gpus", given.get("nproc_per_node"))
    listed = re.fullmatch(r"(?:\w+:)?(\d+(?:,\d+)*)", str(given.get("include", given.get("gpu_ids", ""))))
    if isinstance(everywhere, int):
        return everywhere
    if listed:
        return len(listed[1].split(","))
    return here * nodes if isinstance(here, int) else None


def command_of(found: Translation) -> list[str]:
    """The words of this project's command line, what is of the whole run first."""
    order = ["stage", "name", "output_dir", "seed", "launch", "model", "data", "engine"]
    names = sorted(found.settings, key=lambda name: (*order, name.split(".")[0]).index(name.split(".")[0]))
    return ["experiment=custom", *(override(name, found.settings[name].value) for name in names)]


def described(found: Translation) -> str:
    """The command, and below it where each setting comes from and what became of the other flags."""
    words = command_of(found)
    quoted = " \\\n    ".join(["python run_pipeline.py", *map(shlex.quote, words)])
    width = max(len(word) for word in words if len(word) < 60)
    rows: dict[bool, list[str]] = {False: [], True: []}
    for word in words[1:]:
        setting = found.settings[word.partition("=")[0]]
        rows[setting.is_default].append(f"{word:{width}}  {setting.source}")
    sections = {
        "from the command": rows[False],
        "theirs by default, or fixed there": rows[True],
        "here by itself": found.reasons[Fate.itself],
        "no counterpart": found.reasons[Fate.none],
        "not recognised": found.unknown,
        "look at": found.notes,
    }
    lines = [f"# {found.peer.name}, {found.step}", quoted, ""]
    for title, part in sections.items():
        lines += [f"{title}:", *(f"  {row}" for row in dict.fromkeys(part)), ""] if part else []
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
