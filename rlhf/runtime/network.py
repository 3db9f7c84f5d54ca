"""The network between machines: the device that gloo uses, and connections that notice when a machine is gone.

Imports only the standard library.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import stat
import struct
import sys
from pathlib import Path

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
_QUIET_S, _BETWEEN_PROBES_S, _PROBES = 8, 4, 3
GONE_AFTER_S = _QUIET_S + _BETWEEN_PROBES_S * _PROBES
"""Seconds after which a connection to a machine that no longer answers is broken."""


def choose_device(master: str) -> None:
    """Have gloo use the network device by which this machine reaches `master`, unless GLOO_SOCKET_IFNAME is set.

    By itself gloo takes the device that the machine's own name stands for, which often is loopback, and then waits for
    others in vain. NCCL finds one by itself.

    Raises:
        ValueError: it cannot be known which device leads to the others.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or sys.platform != "linux":
        return
    own, outward = _own_address(master), {pair for pair in _devices() if not ipaddress.ip_address(pair[1]).is_loopback}
    # On the machine of rank 0 its name may stand for loopback; then a single other device will do.
    found = sorted({name for name, address in outward if address == own} or {name for name, _ in outward})
    if len(found) != 1:
        raise ValueError(
            f"MASTER_ADDR={master}: it is not clear which network device leads to the other machines; set "
            f"GLOO_SOCKET_IFNAME on {socket.gethostname()} to {' or '.join(found) or 'a device'}, or "
            "MASTER_ADDR to an address of rank 0's machine in their network."
        )
    os.environ["GLOO_SOCKET_IFNAME"] = found[0]


def notice_lost_machines() -> None:
    """Have the system break this process's connections to machines that have not answered for `GONE_AFTER_S`.

    A process that is stopped or busy is not touched, because its system goes on answering. Otherwise a machine without
    power is noticed when a collective has waited for `launch.timeout_s`. Libraries open connections when they like, so
    it is called again and again.
    """
    descriptors = Path("/proc/self/fd")
    for file in descriptors.iterdir() if descriptors.is_dir() else ():  # Linux alone has the folder
        with contextlib.suppress(OSError):  # closed by now, or no connection
            if stat.S_ISSOCK(file.stat().st_mode):
                _break_when_gone(int(file.name))


def _break_when_gone(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as connection:  # a copy: closing it leaves the original
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
            return
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _QUIET_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _BETWEEN_PROBES_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        # Nothing is asked while sent data waits to be confirmed, so that has a limit of its own.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE_AFTER_S * 1000)


def _own_address(other: str) -> str:
    """The address under which `other` would see this machine; empty if that cannot be found out."""
    with contextlib.suppress(OSError):
        for family, kind, *_, place in socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as connection:
                connection.connect(place)  # sends nothing: it only asks for the way
                return str(connection.getsockname()[0])
    return ""


def _devices() -> set[tuple[str, str]]:
    """Every network device with each of its addresses."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            address = ipaddress.IPv6Address(int(digits, 16))
            if not address.is_link_local:
                found.add((name, str(address)))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(any_socket, _GET_ADDRESS, struct.pack("256s", name.encode()))
                found.add((name, socket.inet_ntoa(answer[20:24])))
    return found
