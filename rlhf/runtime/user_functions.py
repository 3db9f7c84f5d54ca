"""Imports the user's own functions, named as `module:function` or `file.py:function`, and limits the time of a call.

See also: what is called, and how (`rlhf/reward_functions.py`, `rlhf/evaluation/`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

_LONGEST = 300
"""Characters of an error of the user's code that are shown: some hold a whole web page."""

_NOT_THE_USERS = (Path(sysconfig.get_path("stdlib")), Path(__file__).parents[1])


def load_function(target: str, setting: str, *, signature: str) -> Callable[..., Any]:
    """Import `target`, whose module is installed, part of this project, or in the folder where the run was started.

    Args:
        target: `module:function` or `file.py:function`.
        setting: the setting that holds it with its value, for the message.
        signature: how it will be called and what it returns, for the message.

    Raises:
        ValueError: there is no such function, or its module raises an error.
    """
    module, _, name = target.rpartition(":")
    expected = f"expected module:function or file.py:function, {signature}"
    if not module or not name:
        raise ValueError(f"{setting}: no such function ({target!r} lacks a part); {expected}.")
    found = _file(Path(module), setting) if module.endswith(".py") else _module(module, setting, expected=expected)
    try:
        function: object = reduce(getattr, name.split("."), found)
    except AttributeError as error:
        raise ValueError(f"{setting}: no such function ({error}); {expected}.") from error
    if not callable(function):
        raise ValueError(f"{setting}: found a {type(function).__name__}; expected a function, {signature}.")
    return function


def _module(name: str, setting: str, *, expected: str) -> ModuleType:
    _search(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):  # not one that the module imports
            raise ValueError(f"{setting}: no such function ({error}); {expected}.") from error
        raise _import_error(error, setting) from error
    except Exception as error:
        raise _import_error(error, setting) from error


def _file(path: Path, setting: str) -> ModuleType:
    """The module in a file, which is imported once; modules beside it can be imported by it."""
    path = path.expanduser().absolute()
    if not path.is_file():
        raise ValueError(f"{setting}: there is no file {path}; expected file.py:function.")
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    _search(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # before it runs: its own classes look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_error(error, setting) from error
    return module


def _search(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that nothing there shadows a library


def _import_error(error: Exception, setting: str) -> ValueError:
    return ValueError(
        f"{setting}: its module cannot be imported: {described(error)}. Mend it, or install what it needs."
    )


def described(error: BaseException) -> str:
    """An error of the user's code in one line, with the line that raised it, or that called the library that did."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    if isinstance(error, SyntaxError) or not places:  # the former says itself where it is
        return text
    place = ([frame for frame in places if not _is_library(frame.filename)] or places)[-1]
    return f"{text} ({Path(place.filename).name}, line {place.lineno})"


def _is_library(file: str) -> bool:
    """Whether a file is of this project, of Python or of a package, and not the user's."""
    path = Path(file)
    return any(map(path.is_relative_to, _NOT_THE_USERS)) or bool({"site-packages", "dist-packages"} & {*path.parts})


class TimeLimitError(BaseException):
    """A call took too long. Not an Exception, so that the user's own `except Exception` cannot swallow it."""


def call_within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns; it is interrupted after `seconds`.

    A signal does it, because the call must stay in the main thread: what users call may use signals itself, which work
    nowhere else. SIGALRM is left to them.

    Raises:
        TimeLimitError: also where the call ended too late because it did not let itself be interrupted.
    """
    runs = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal runs
        if runs:
            runs = False  # at most one error, so that none can interrupt what follows it
            raise TimeLimitError

    started, main = time.monotonic(), threading.main_thread().ident
    before = signal.getsignal(signal.SIGVTALRM)
    timer = threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGVTALRM))
    timer.daemon = True  # never keeps the process alive
    try:
        try:
            signal.signal(signal.SIGVTALRM, interrupt)
            timer.start()
            result = call()
        finally:
            runs = False  # the signal may come up to here, and an error that it raises still passes the outer `finally`
        if time.monotonic() - started >= seconds:
            raise TimeLimitError
        return result
    finally:
        timer.cancel()
        if timer.is_alive():
            timer.join()  # before the handler goes
        if callable(before):  # never back to none, with which a signal that is still on its way would end the process
            signal.signal(signal.SIGVTALRM, before)
