"""The suite tells what fails when it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LONGEST

ROOT = Path(__file__).parents[1]
TESTS = """
import time
from pathlib import Path

def test_that_fails():
    assert "this" == "that"

def test_what_was_printed_before():
    end = time.monotonic() + 60
    while "assert 'this' == 'that'" not in Path("log").read_text():
        assert time.monotonic() < end
"""


@pytest.mark.parametrize("options", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_a_failure_is_printed_before_the_next_test(tmp_path, options):
    (tmp_path / "test_two.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (tmp_path / "torch.py").write_text("set_num_threads = manual_seed = print")
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "test_two.py", *options]
        done = subprocess.run(
            command, cwd=tmp_path, stdout=log, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, check=False
        )
    assert done.returncode == 1
    assert "1 failed, 1 passed" in (tmp_path / "log").read_text()


def test_files_that_come_first_exist():
    assert [name for name in LONGEST if not (ROOT / name).exists()] == []
