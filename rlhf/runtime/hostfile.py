"""DeepSpeed's hostfile, `--include` and `--exclude`: which devices are used on which hosts.

A hostfile has a line `HOST slots=N` for each host, and comments after `#`. A filter is `HOST[:SLOT,SLOT...]@HOST...`;
without slots it means all of a host (https://www.deepspeed.ai/getting-started/#resource-configuration-multi-node).
"""

from __future__ import annotations

import re
from pathlib import Path

Slots = dict[str, list[int]]
"""The devices that are used on each host, in the order of ranks."""

_LINE = re.compile(r"(\S+)\s+slots=(\d+)(\s.*)?")
_FILTER = "HOST[:SLOT,SLOT...]@HOST..., such as worker-0@worker-1:0,2"


def read_hostfile(path: Path) -> Slots:
    """All devices of the hosts in a hostfile, in its order.

    Raises:
        ValueError: there is no such file, a line cannot be read, or a host is there twice.
    """
    if not path.is_file():
        raise ValueError(f"--hostfile {path}: there is no such file (looked from {Path.cwd()}).")
    slots: Slots = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = _LINE.fullmatch(text)
        if found is None or not int(found[2]):
            raise ValueError(f"{path}, line {number}: found {text!r}, expected HOST slots=N, such as worker-1 slots=8.")
        if found[1] in slots:
            raise ValueError(f"{path}, line {number}: {found[1]} is there already; expected each host once.")
        slots[found[1]] = list(range(int(found[2])))
    if not slots:
        raise ValueError(f"{path} names no host; expected lines HOST slots=N, such as worker-1 slots=8.")
    return slots


def selected(slots: Slots, *, include: str, exclude: str) -> Slots:
    """What a filter leaves of `slots`, in the order of hosts there; at most one of the two is given.

    Raises:
        ValueError: both are given, a host or slot does not exist, or nothing is left.
    """
    if include and exclude:
        raise ValueError("--include and --exclude: expected one of them; leave the other out.")
    option, text = ("--include", include) if include else ("--exclude", exclude)
    chosen = _parsed(text, option) if text else {}
    for host, numbers in chosen.items():
        unknown = sorted(set(numbers) - set(slots.get(host, ())))
        if host not in slots:
            raise ValueError(f"{option} {text}: there is no host {host}; expected one of {', '.join(slots)}.")
        if unknown:
            raise ValueError(f"{option} {text}: {host} has slots 0 to {len(slots[host]) - 1}, not {unknown[0]}.")
    if include:
        left = {host: chosen[host] or every for host, every in slots.items() if host in chosen}
    else:
        out = {host: set(numbers or slots[host]) for host, numbers in chosen.items()}
        left = {host: [slot for slot in every if slot not in out.get(host, ())] for host, every in slots.items()}
    left = {host: numbers for host, numbers in left.items() if numbers}
    if not left:
        raise ValueError(f"{option} {text}: no device is left; expected at least one.")
    return left


def _parsed(text: str, option: str) -> Slots:
    """The slots that a filter names, sorted; none of a host stands for all."""
    chosen: Slots = {}
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        if not host or (colon and not re.fullmatch(r"\d+(,\d+)*", numbers)):
            raise ValueError(f"{option} {text}: {part!r} cannot be read; expected {_FILTER}.")
        named = {int(number) for number in numbers.split(",")} if colon else set()
        chosen[host] = sorted(named.union(chosen.get(host, ())))
    return chosen
