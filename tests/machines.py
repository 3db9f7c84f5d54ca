"""Several machines on this one: network namespaces on a bridge, each with a host name and, if asked, its own folders.

Ranks start as srun starts its tasks. Needs root and `ip` (iproute2).
"""

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.forking import ROOT, Forked

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_NAME, _NEW_NETWORK = 0x00020000, 0x04000000, 0x40000000  # of <sched.h>
_PRIVATE, _BIND, _RECURSIVE = 1 << 18, 4096, 16384  # of <sys/mount.h>
_numbers = itertools.count()


def _can_make_machines():
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return made


needs_machines = pytest.mark.skipif(not _can_make_machines(), reason="needs root and iproute2")


def _ip(text):
    subprocess.run(["ip", *text.split()], check=True)


class Machine:
    """A network namespace with one device, `net0`; its processes see `host` as the name of their machine."""

    def __init__(self, name, host, address, *, switch):
        self.name, self.host, self.address, self.switch = name, host, address, switch
        self.children = []
        self.mounts = {}
        """Folders of this machine alone: where they are seen, and where they are."""

    def run(self, *words, log, cwd, **variables):
        """Start `python *words`."""
        mounts = {str(seen): str(real) for seen, real in self.mounts.items()}
        order = {"command": words, "cwd": str(cwd), "env": os.environ | {"OMP_NUM_THREADS": "1"} | variables}
        with Path(log).open("ab") as file, Path(os.devnull).open() as nothing:
            files = [file.fileno() for file in (nothing, file, file)]
            self.children.append(Forked(order | {"machine": [self.name, self.host, mounts]}, files))

    def rank(self, *words, log, cwd, **variables):
        """Start `run_pipeline.py` as a rank; `variables` say which."""
        self.run(str(ROOT / "run_pipeline.py"), *words, log=log, cwd=cwd, **variables)

    def signal(self, number):
        """Send a signal to all that was started here."""
        for child in self.children:
            for process in [*_descendants(child.pid), child.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)

    def link(self, state):
        """Set the cable `up` or `down`."""
        _ip(f"-n {self.switch} link set {self.name} {state}")


def enter(name, host, mounts):
    """Become a process of a machine: only this one sees its network, name and folders."""
    namespace = os.open(f"/run/netns/{name}", os.O_RDONLY)
    _check(_LIBC.setns(namespace, _NEW_NETWORK))
    _check(_LIBC.unshare(_NEW_NAME | _NEW_MOUNTS))
    socket.sethostname(host)
    _check(_LIBC.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None))
    for seen, real in mounts.items():
        _check(_LIBC.mount(real.encode(), seen.encode(), None, _BIND, None))


def _check(result):
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _descendants(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [*_descendants(child), child]
    return found


@contextlib.contextmanager
def machines(count):
    """Machines with the addresses 10.77.0.1, 10.77.0.2, ... on one network, which nothing else reaches."""
    own = f"{os.getpid()}-{next(_numbers)}"
    switch, found, folder = f"sw{own}", [], tempfile.mkdtemp()
    _ip(f"netns add {switch}")
    try:
        _ip(f"-n {switch} link add name bridge type bridge")
        _ip(f"-n {switch} link set bridge up")
        for number in range(1, count + 1):
            name, address = f"m{number}x{own}"[-15:], f"10.77.0.{number}"
            _ip(f"netns add {name}")
            found.append(Machine(name, f"host{number}", address, switch=switch))
            _ip(f"-n {switch} link add {name} type veth peer name net0 netns {name}")
            _ip(f"-n {switch} link set {name} master bridge up")
            _ip(f"-n {name} address add {address}/24 dev net0")
            _ip(f"-n {name} link set net0 up")
            _ip(f"-n {name} link set lo up")
        for machine in found:
            machine.mounts["/etc/hosts"] = names = Path(folder) / machine.name
            # As Debian's installer writes it: a machine's own name is no address that others could use.
            others = "".join(f"{other.address} {other.host}\n" for other in found if other is not machine)
            names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {machine.host}\n{others}")
        yield found
    finally:
        for machine in found:
            machine.signal(signal.SIGKILL)
            statuses([machine], seconds=10)
            _ip(f"netns delete {machine.name}")
        _ip(f"netns delete {switch}")
        shutil.rmtree(folder)


def start_ranks(hosts, *words, logs, counts, cwd, first=0, of=None, **variables):
    """Start `counts[i]` ranks on each of `hosts`, as srun does; logs are called `rank0`, ...

    Those from `first` on of `of`, if others are started with other words.
    """
    total, rank = of or sum(counts), first
    for host, count in zip(hosts, counts, strict=False):
        for local in range(count):
            place = {"RANK": rank, "WORLD_SIZE": total, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": count}
            place |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": 29400}
            place = {name: str(value) for name, value in place.items()}
            host.rank(*words, log=logs / f"rank{rank}", cwd=cwd, **place, **variables)
            rank += 1


def statuses(hosts, *, seconds):
    """The exit statuses of everything that was started, in order; fails where something runs on for too long."""
    end, found = time.monotonic() + seconds, []
    for host in hosts:
        for child in host.children:
            while child.poll() is None:
                assert time.monotonic() < end, "still running"
                time.sleep(0.05)
            found.append(child.returncode)
        host.children.clear()
    return found


def until(condition, *, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)
