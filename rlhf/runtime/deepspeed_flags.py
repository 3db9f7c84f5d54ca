"""The flags of DeepSpeed's launcher: how many ranks run, on which devices of which hosts.

On this host they run; of several hosts each gets a command of torchrun, which is printed, or run where `--node_rank`
says which host this is. Nothing is started over ssh. Torch is imported only where devices must be counted.
See also: the grammar of hosts and devices (`hostfile.py`).
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rlhf.runtime.hostfile import Slots, read_hostfile, selected

_DEFAULT_HOSTFILE = Path("/job/hostfile")
_DEFAULT_PORT = 29500
_HERE = "localhost"
_CHOSEN = ("--include", "--exclude")
_VALUES = ("hostfile", "include", "exclude", "num_nodes", "num_gpus", "master_addr", "master_port", "node_rank")
_ELASTIC = ("min_elastic_nodes", "max_elastic_nodes")
_SWITCHES = ("no_ssh", "no_ssh_check", "force_multi", "no_local_rank", "bind_cores_to_rank", "elastic_training")
_SHORT = {"hostfile": ["-H"], "include": ["-i"], "exclude": ["-e"], "num_gpus": ["--num_accelerators"]}
_NO_SSH = "nothing is started on other hosts: without --node_rank, the commands for them are printed"
_REFUSED = {
    **dict.fromkeys(
        ("--launcher", "--launcher_args", "--ssh_port", "--comment", "--account", "--venv_script"), _NO_SSH
    ),
    **dict.fromkeys(("--module", "--no_python"), "which program runs is known; leave it out"),
    "--save_pid": "process ids are not written; leave it out",
    "--enable_each_rank_log": "torchrun writes a log of each rank, with --redirects 3 --log-dir FOLDER",
    "--autotuning": "plan=true says what fits into memory",
}


@dataclass(frozen=True)
class Launch:
    """Where ranks run, as the flags say."""

    hosts: Slots
    """Devices by host; empty where no flag says how many."""
    words: list[str]
    """The rest of the command line."""
    nodes: str = "1"
    """Hosts as torchrun's `--nnodes` wants them: a number, or MIN:MAX."""
    master: str = ""
    """Name or address of the first host, where ranks meet."""
    port: int = _DEFAULT_PORT
    node_rank: int | None = None
    """Which of the hosts this one is, if that was said."""
    is_here: bool = True
    """All ranks run on this machine."""
    chooses_devices: bool = False
    """Some devices of a host are left out."""

    def devices(self, host: str) -> dict[str, str]:
        """The variable that shows the ranks of a host their devices alone; empty where they have all of them."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.hosts[host]))} if self.chooses_devices else {}

    def torchrun(self, host: str, program: Sequence[str]) -> list[str]:
        """The words of torchrun that start the ranks of a host."""
        options = ["--nnodes", self.nodes, "--nproc-per-node", str(len(self.hosts[host]))]
        if ":" in self.nodes:  # the hosts number themselves
            options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.master}:{self.port}"]
            options += ["--max-restarts", "3"]
        else:
            options += ["--node-rank", str(list(self.hosts).index(host))]
            options += ["--master-addr", self.master, "--master-port", str(self.port)]
        return [*options, *program, *self.words]


def has_flags(words: Sequence[str]) -> bool:
    """Whether a command line has a flag of DeepSpeed's launcher."""
    known = {f"--{name}" for name in (*_VALUES, *_ELASTIC, *_SWITCHES)} | {
        *_REFUSED,
        "--bind_core_list",
        "--local_rank",
    }
    known |= {short for names in _SHORT.values() for short in names}
    return any(word.partition("=")[0] in known for word in words)


def read_flags(words: Sequence[str]) -> Launch:
    """Where ranks run, by the flags in `words`; binds this process where `--bind_core_list` says so.

    Raises:
        ValueError: a flag that means nothing here, flags that contradict each other, or hosts that do not exist.
    """
    for word in words:
        if word.partition("=")[0] in _REFUSED:
            raise ValueError(f"{word}: {_REFUSED[word.partition('=')[0]]}.")
    flags, rest = _parser().parse_known_args(words)
    placed = [f"--{name}" for name in (*_VALUES, *_ELASTIC) if getattr(flags, name) is not None]
    if placed and "RANK" in os.environ:
        raise ValueError(f"{placed[0]}: the ranks were started already, by another launcher; leave this flag out.")
    if flags.bind_core_list is not None:
        _bind_to(flags.bind_core_list)
    if flags.bind_cores_to_rank:
        rest.append("launch.bind_cores=true")
    if "RANK" in os.environ:
        return Launch({}, rest)
    hosts, is_listed = _hosts(flags)
    nodes = str(len(hosts) or 1)
    if flags.elastic_training:
        most = flags.max_elastic_nodes or len(hosts)
        nodes = f"{flags.min_elastic_nodes or 1}:{most}"
    here = not is_listed or (len(hosts) == 1 and _is_this_host(next(iter(hosts))))
    launch = Launch(
        hosts,
        rest,
        nodes=nodes,
        master=flags.master_addr or next(iter(hosts), ""),
        port=flags.master_port or _DEFAULT_PORT,
        node_rank=flags.node_rank,
        is_here=here and not (flags.force_multi or flags.elastic_training),
        chooses_devices=bool(flags.include or flags.exclude),
    )
    _check(launch)
    return launch


def apply_flags(launch: Launch, *, program: Sequence[str]) -> list[str]:
    """Continue as the flags say: returns the settings of a run on this host; others get torchrun, or its commands.

    Args:
        launch: what the flags say.
        program: how torchrun starts this program, such as `["-m", "run_pipeline"]`.
    """
    if not launch.is_here:
        _start_or_print(launch, program)
    return [*launch.words, *(f"launch.ranks={len(slots)}" for slots in launch.hosts.values())]


def _start_or_print(launch: Launch, program: Sequence[str]) -> NoReturn:
    """Become torchrun on the host that is meant, or print its commands for all of them."""
    if launch.node_rank is not None:
        host = list(launch.hosts)[launch.node_rank]
        os.environ |= launch.devices(host)
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *launch.torchrun(host, program)])
    for host in launch.hosts:
        devices = [f"{name}={value}" for name, value in launch.devices(host).items()]
        sys.stdout.write(
            f"# {host}\n{' '.join([*devices, shlex.join(['torchrun', *launch.torchrun(host, program)])])}\n"
        )
    sys.stdout.flush()
    sys.exit(
        "Nothing has been started. Start each of these commands on its host, in a folder that all hosts share, or the "
        "same command as here with --node_rank 0, 1, ... on each."
    )


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours to report."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; DeepSpeed's flags are written as in --num_gpus 8 or --hostfile FILE.")


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in _VALUES:
        is_number = name.startswith(("num_", "node_", "master_port"))
        parser.add_argument(*_SHORT.get(name, ()), f"--{name}", dest=name, type=_count if is_number else str)
    for name in _ELASTIC:
        parser.add_argument(f"--{name}", type=_count)
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--bind_core_list")
    parser.add_argument("--local_rank", type=_count)  # DeepSpeed's own launcher gives it; LOCAL_RANK says the same
    return parser


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number")
    return int(text)


def _hosts(flags: argparse.Namespace) -> tuple[Slots, bool]:
    """The hosts and their devices, and whether these are those of a hostfile, or of several hosts without names."""
    chosen = [name for name in _CHOSEN if getattr(flags, name[2:])]
    counted = [f"--{name}" for name in ("num_nodes", "num_gpus") if getattr(flags, name) is not None]
    if chosen and counted:
        raise ValueError(f"{chosen[0]} and {counted[0]}: expected one of them, because each says which devices run.")
    pool, is_listed = _pool(flags, is_counted=bool(chosen or counted))
    pool = selected(pool, include=flags.include or "", exclude=flags.exclude or "") if chosen else pool
    hosts = dict(list(pool.items())[: flags.num_nodes or None])
    if flags.num_nodes is not None and not 0 < flags.num_nodes <= len(pool):
        raise ValueError(f"--num_nodes {flags.num_nodes}: found {len(pool)} host(s), expected 1 to that many.")
    if flags.num_gpus is not None:
        few = next((host for host, slots in hosts.items() if not 0 < flags.num_gpus <= len(slots)), None)
        if few is not None:
            raise ValueError(
                f"--num_gpus {flags.num_gpus}: {few} has {len(hosts[few])} slots; expected 1 to that many."
            )
        hosts = {host: slots[: flags.num_gpus] for host, slots in hosts.items()}
    return hosts, is_listed


def _pool(flags: argparse.Namespace, *, is_counted: bool) -> tuple[Slots, bool]:
    """All devices before any are left out, and whether they are on hosts that a file or `--num_nodes` lists."""
    default = _DEFAULT_HOSTFILE if _DEFAULT_HOSTFILE.is_file() else None
    file = Path(flags.hostfile).expanduser() if flags.hostfile else default
    if file is not None:
        return read_hostfile(file), True
    if (flags.num_nodes or 1) > 1:
        if not flags.num_gpus:
            raise ValueError(f"--num_nodes {flags.num_nodes}: expected --hostfile, or --num_gpus and --master_addr.")
        return {f"host {number}": list(range(flags.num_gpus)) for number in range(flags.num_nodes)}, True
    if flags.num_gpus:
        return {_HERE: list(range(flags.num_gpus))}, False
    if not is_counted:
        return {}, False
    named = [int(slot) for slot in (flags.include or "").partition(":")[2].split(",") if slot.isdigit()]
    count = _device_count() or (max(named) + 1 if named else 0)
    if not count:
        raise ValueError("this machine has no GPU to count; expected --num_gpus N, which is how many ranks there are.")
    return {_HERE: list(range(count))}, False


def _device_count() -> int:
    import torch  # takes seconds, and only here is it needed

    return torch.cuda.device_count()


def _check(launch: Launch) -> None:
    given = [word for word in launch.words if word.startswith("launch.ranks=")]
    if given and launch.hosts:
        raise ValueError(f"{given[0]}: the flags of DeepSpeed say how many ranks there are; leave one of them out.")
    if launch.is_here:
        return
    if not launch.hosts:
        raise ValueError("--elastic_training and --force_multi: expected hosts; name them with --hostfile FILE.")
    if launch.master.startswith("host ") or (launch.master == _HERE and len(launch.hosts) > 1):
        raise ValueError("--master_addr: missing; expected the name or address of the first host, where ranks meet.")
    if launch.node_rank is not None and launch.node_rank >= len(launch.hosts):
        raise ValueError(f"--node_rank {launch.node_rank}: found {len(launch.hosts)} hosts, expected less than that.")


def _is_this_host(host: str) -> bool:
    """Whether a name or address is one of this machine's."""
    if host in (_HERE, socket.gethostname(), socket.getfqdn()):
        return True
    try:
        with socket.create_server((host, 0)):  # only an own address can be listened on
            return True
    except OSError:
        return False


def _bind_to(cores: str) -> None:
    """Keep this process and the ranks that it starts to cores such as `0,2-4`."""
    numbers: set[int] = set()
    for part in cores.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or "0").isdigit():
            raise ValueError(f"--bind_core_list {cores}: expected numbers and ranges, such as 0,2-4.")
        numbers |= set(range(int(first), int(last or first) + 1))
    missing = numbers - os.sched_getaffinity(0)
    if missing:
        raise ValueError(f"--bind_core_list {cores}: core {min(missing)} is not one that this process may use.")
    os.sched_setaffinity(0, numbers)
