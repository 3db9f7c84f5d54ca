"""Finds the commands that a shell script would start: bash follows it, starts no program and writes no file."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

STARTERS = ("deepspeed", "accelerate", "torchrun", "trl", "python", "python3", "uv", "hf")
WRAPPERS = ("env", "exec", "nohup", "numactl", "sudo", "srun", "mpirun")
"""Programs that start the command behind them."""
SECONDS = 10
"""After which a script is taken to wait for something."""
STUBS = r"""
cd() { :; }; source() { :; }; enable -n kill history
command_not_found_handle() { local IFS=_; printf '$(%s)' "${*// /_}"; }
seq() { local from=1 to=$1; (($# > 1)) && { from=$1; to=${!#}; }; for ((; from <= to; from++)); do echo $from; done; }
"""
"""What a restricted shell refuses does no harm; it would not refuse `kill`, and `history`, which may write a file. The
output of a program is replaced by one word, `$(date_+%s)`."""


def commands(text: str, arguments: Sequence[str] = (), *, file: Path | None = None) -> list[list[str]]:
    """The commands of a script that start a training, each as its words.

    Loops, conditions and functions are those of bash, and so is the order. A restricted shell (`bash -r`) without a
    PATH finds no programs and refuses to write files; it prints each command, with its variables filled in.

    Args:
        text: The script, or one command.
        arguments: What the script is started with: $1 and so on.
        file: The script's own, if it is in one: scripts that it starts may be named from any folder above it.

    Raises:
        ValueError: Bash does not understand the script, or it does not end by itself.
    """
    found: list[list[str]] = []
    for words in _traced(text, arguments):
        words = shlex.split(" ".join(words[1:])) if words[:1] == ["eval"] else words
        start = 0
        if words and _name(words[0]) in WRAPPERS:
            start = next((n for n, word in enumerate(words) if _name(word) in (*STARTERS, "bash", "sh")), 0)
        program, *rest = words[start:] or [""]
        places = (Path(), *(file.resolve().parents if file else ())) if rest else ()
        script = next((place / rest[0] for place in places if (place / rest[0]).is_file()), None)
        if _name(program) in ("bash", "sh") and script:
            found += commands(script.read_text("utf-8"), rest[1:], file=script)
        elif _name(program) in STARTERS:
            found.append([program, *rest])
    return found


def _name(word: str) -> str:
    return word.rpartition("/")[2]


def _traced(text: str, arguments: Sequence[str]) -> list[list[str]]:
    """The words of every simple command in the order in which bash comes to it."""
    environment = {name: os.environ[name] for name in ("HOME", "USER") if name in os.environ}
    # `set -e` would end the script at the first file that it may not write.
    text = re.sub(r"(?m)\r$", "", text)
    text = re.sub(r"(?m)^\s*set [-+][a-zA-Z].*$", ":", text)
    text = re.sub(r"(?m)^\s*(?:\$ |[!%])(?=\w)", "", text)  # the prompt of a terminal or a notebook
    with tempfile.TemporaryFile() as trace:
        head = f"{STUBS}PS4=$'\\x01'; BASH_XTRACEFD={trace.fileno()}; set -x\n"
        try:
            bash = subprocess.run(
                [shutil.which("bash") or "/bin/bash", "-r", "-c", head + text, "script", *arguments],
                env=environment | {"PATH": "/nonexistent", "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=[trace.fileno()],
                start_new_session=True,  # what it signals is itself
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError("the script does not end by itself; give the command that it starts.") from error
        trace.seek(0)
        lines = re.findall(r"\x01+[^\x01]*", trace.read().decode("utf-8", "replace"))
    said = bash.stderr.decode("utf-8", "replace")
    wrong, where = (re.search(text, said) for text in (r"(?:syntax error|unexpected EOF).*", r"line \d+: (`.*')"))
    if wrong:
        raise ValueError(f"bash does not understand {where[1] if where else 'the command'}: {wrong[0]}.")
    return [_words(line[1:]) for line in lines if line[:2] != "\x01\x01"]  # two of them: inside $(...)


def _words(line: str) -> list[str]:
    """The words of a line of the trace, in which bash writes what is not printable as in Python, between $' and '."""
    return shlex.split(re.sub(r"\$('(?:[^'\\]|\\.)*')", lambda part: shlex.quote(ast.literal_eval(part[1])), line))
