"""A forked program is told what a started one is, and says how it ends."""

import os
import signal
import subprocess
import time

import pytest

from tests.forking import make_programs, run_forked

PROGRAM = """
import atexit, os, signal, sys
atexit.register(print, "at exit")
print(sys.argv[1:], os.getcwd(), os.environ["ASKED"], os.environ.get("RANK", "alone"), sys.stdin.read())
sys.stderr.write("an error\\n")
exec(sys.argv[1])
"""


@pytest.fixture
def program(tmp_path):
    """Runs the program with one word, which it executes."""
    (tmp_path / "program.py").write_text(PROGRAM)
    env = os.environ | {"ASKED": "yes"}
    return lambda word, **options: run_forked(tmp_path / "program.py", word, cwd=tmp_path, env=env, **options)


@pytest.mark.parametrize(
    ("word", "status", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('a sentence')", 1, "a sentence\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ],
)
def test_it_has_its_own_words_folder_environment_and_end(program, tmp_path, word, status, said):
    done = program(word)
    assert done.returncode == status
    if status >= 0:
        assert done.stdout == f"{[word]} {tmp_path} yes alone \nat exit\n"
        assert done.stderr == f"an error\n{said}"


def test_an_exception_is_shown_and_the_next_one_starts_afresh(program):
    done = program("os.environ['LEFT'] = 'here'; sys.modules['left'] = 1; 1 / 0")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert program("sys.exit(4 if 'LEFT' in os.environ or 'left' in sys.modules else 0)").returncode == 0


def test_ranks_are_told_which_they_are_and_one_that_fails_ends_all(program):
    done = program("pass", ranks=2)
    assert done.returncode == 0
    assert sorted(line.split()[-1] for line in done.stdout.splitlines() if "yes" in line) == ["0", "1"]
    waits = "os.environ['RANK'] == '1' and sys.exit(5); signal.pause()"
    assert program(waits, ranks=2).returncode == signal.SIGKILL


@pytest.fixture
def shell(tmp_path):
    """Starts a line of bash that finds the programs `python` and `named`."""
    make_programs(tmp_path / "bin", named="-m named")
    (tmp_path / "named.py").write_text("import os, sys\nprint(sys.argv[1:], __name__, os.getpid())\n")
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def start(line):
        pipe = subprocess.PIPE
        return subprocess.Popen(["bash", "-c", line], cwd=tmp_path, env=env, text=True, stdin=pipe, stdout=pipe)

    return start


def test_a_shell_has_modules_code_pipes_and_statuses(shell):
    running = shell("named 'a b' && python -c 'import sys; print(sys.argv, sys.stdin.read()); sys.exit(7)' c")
    said, _ = running.communicate("typed")
    module, code = said.splitlines()
    assert module.startswith("['a b'] __main__ ")
    assert code == "['-c', 'c'] typed"
    assert running.returncode == 7


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_program_of_a_shell_ends_when_it_is_told_to(shell, sent):
    with shell("exec python -c 'import os, signal; print(os.getpid(), flush=True); signal.pause()'") as running:
        program = int(running.stdout.readline())
        os.kill(program, 0)
        running.send_signal(sent)
        assert running.wait(timeout=60) == -sent
    end = time.monotonic() + 60
    while os.path.exists(f"/proc/{program}"):  # noqa: PTH110
        assert time.monotonic() < end
        time.sleep(0.01)
