"""Every test starts from the same seed, on one thread, without a network."""

import logging
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# A shell starts what is in the background with SIGINT ignored, and the processes of the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = [
    "tests/test_readme.py",
    "tests/stages/test_pipeline.py",
    "tests/test_docs.py",
    "tests/stages/test_machines.py",
    "tests/engine/test_parity.py",
    "tests/stages/lifecycle/test_checkpointing.py",
    "tests/stages/test_reward_runs.py",
]
"""Files that take a minute or more. They come first: one that came last would run alone, beside idle cores."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.nodeid.split("::")[0] not in LONGEST)


@pytest.fixture(autouse=True)
def _same_start():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = logging.root.handlers[:]
    yield
    for handler in set(logging.root.handlers) - set(before):  # those of a run that a test has started
        logging.root.removeHandler(handler)


class FailuresAtOnce:
    """Prints each failure when it happens, and not at the end alone: a run may be long, and interrupted."""

    def __init__(self, terminal):
        self.terminal = terminal

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.write_line(f"{report.when} of {report.nodeid} failed:\n{report.longreprtext}", red=True)
            self.terminal.flush()


@pytest.hookimpl(trylast=True)  # after pytest has made the terminal; the workers of xdist have none
def pytest_configure(config):
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        config.pluginmanager.register(FailuresAtOnce(terminal))
