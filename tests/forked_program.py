"""Stands in for a program that `forking.py` runs: it has the same words, folder, environment, files, signals and end.

A program of its own, which imports little, because to start quickly is what it is for.
"""

import json
import os
import signal
import socket
import sys

_PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def start(server, order, files):
    """Ask the server at a socket's path; it answers with a line that has the process, and later one with its end."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server)
    socket.send_fds(connection, [b" "], files)
    connection.sendall(f"{json.dumps(order)}\n".encode())
    return connection


def _main(server, executable, *words):
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until there is a process that they can be passed on to
    order = {"command": words, "cwd": os.getcwd(), "env": dict(os.environ), "executable": executable}  # noqa: PTH109
    answers = start(server, order, [0, 1, 2]).makefile()
    process = int(answers.readline())
    for number in _PASSED_ON:
        signal.signal(number, lambda sent, _: os.kill(process, sent))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    status = int(answers.readline())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    _main(*sys.argv[1:])
