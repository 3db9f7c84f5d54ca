"""Tells errors that one sentence explains to the user from mistakes in the program, which need their traceback."""

from __future__ import annotations

import dis
import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
_NEEDS_CODE = (
    "it needs code that it brings along, which is never run here. Choose a model that transformers knows by itself, or "
    "convert it once where you trust its code."
)


class RunError(RuntimeError):
    """Ends a run because something it needs has failed; the message says what to do.

    For a full disk, a damaged checkpoint, gradients that are never finite; not for a mistake in the program.
    """


def file_error(error: BaseException, path: object) -> str | None:
    """What the operating system reports about `path`, and what to do; None for errors of another origin."""
    number, reason = None, ""
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror or str(error)
    elif found := _RUST.search(str(error)):
        number, reason = int(found[2]), found[1]
    return None if number is None else f"{path}: {reason}. {_ADVICE.get(number, '')}".rstrip()


def sentence_of(error: BaseException) -> str | None:
    """The message for the user; None for a mistake in the program, whose traceback says more.

    A ValueError is for the user if a `raise` in these sources made it, but not if Python or a library did.
    """
    if isinstance(error, RunError) or (isinstance(error, ValueError) and _is_raised_here(error)):
        return str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _ADVICE):
        return file_error(error, error.filename or "a file")
    return None


def keep_traceback(error: BaseException, folder: Path) -> str:
    """Write the traceback of `error` to a file of this rank in `folder`; returns a note that names the file.

    The note is empty if the file cannot be written.
    """
    rank = os.environ.get("RANK", "0")
    path = folder / ("traceback.txt" if rank == "0" else f"traceback-rank{rank}.txt")
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    except OSError:  # often the very disk that is full; the sentence must still reach the user
        return ""
    return f" (Where it came from is in {path}.)"


def load_auto(auto_class: Any, path: str | Path, *, complaint: str, **options: Any) -> Any:
    """`auto_class.from_pretrained(path)` for an `Auto...` class of transformers; runs no code of the model's own.

    Raises:
        ValueError: begins with `complaint`, and says why: a file is missing or damaged, or needs code of its own.
    """
    with reading(complaint):
        return auto_class.from_pretrained(path, trust_remote_code=False, **options)


@contextmanager
def reading(complaint: str) -> Iterator[None]:
    """Turn any error inside into a ValueError: libraries raise errors of every kind over a damaged file."""
    try:
        yield
    except Exception as error:
        found = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{complaint} {_NEEDS_CODE if 'trust_remote_code' in str(error) else found}") from error


def _is_raised_here(error: BaseException) -> bool:
    trace = error.__traceback__  # the outermost frame; the innermost raised it
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    # `int("x")` in our sources raises at a call; only `raise` compiles to this instruction.
    return code.co_filename.startswith(_OURS) and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
