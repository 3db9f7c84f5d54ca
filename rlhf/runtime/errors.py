"""Which errors end a run in one sentence, and which are mistakes in the program and need their traceback."""

from __future__ import annotations

import dis
import errno
import os
import re
import traceback
from pathlib import Path

_SOURCES = Path(__file__).parents[2]
_OURS = tuple(str(_SOURCES / name) for name in ("rlhf/", "stages/", "data/", "run_pipeline.py"))
_RUST = re.compile(r"(.+) \(os error (\d+)\)")  # how tokenizers and safetensors report the operating system's errors
_ROOM = "Make room there and start the same command again."
_RIGHTS = "Allow this process to use it, or choose another place."
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS),
    errno.EIO: "The disk cannot be relied on: choose another.",
}


class RunError(RuntimeError):
    """Ends a run from inside: what it needs has failed, and the message says what to do.

    A disk that is full, a checkpoint that is damaged, gradients that are never finite; no mistake in the program.
    """


def file_error(error: BaseException, path: object) -> str | None:
    """What the operating system says went wrong with `path`, and what to do; None where `error` is none of its."""
    number, reason = None, ""
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror or str(error)
    elif found := _RUST.search(str(error)):
        number, reason = int(found[2]), found[1]
    return None if number is None else f"{path}: {reason}. {_ADVICE.get(number, '')}".rstrip()


def sentence_of(error: BaseException) -> str | None:
    """What to tell the user; None for a mistake in the program, whose traceback says more.

    A ValueError is for the user where a `raise` of these sources has made it; one that Python or a library has raised
    by itself is not.
    """
    if isinstance(error, RunError) or (isinstance(error, ValueError) and _is_raised_here(error)):
        return str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _ADVICE):
        return file_error(error, error.filename or "a file")
    return None


def keep_traceback(error: BaseException, folder: Path) -> str:
    """Write where `error` came from to a file of this rank in `folder`; returns a note that names it.

    Empty where the file cannot be written either.
    """
    rank = os.environ.get("RANK", "0")
    path = folder / ("traceback.txt" if rank == "0" else f"traceback-rank{rank}.txt")
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    except OSError:
        return ""
    return f" (Where it came from is in {path}.)"


def _is_raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    return code.co_filename.startswith(_OURS) and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
