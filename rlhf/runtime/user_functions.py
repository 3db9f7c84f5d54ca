"""Imports the user's own functions, which settings name as `module:function`."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(target: str, setting: str, *, signature: str) -> Callable[..., Any]:
    """Import `target`, whose module is installed, part of this project, or in the folder where the run was started.

    Args:
        target: `module:function`.
        setting: the setting that holds it with its value, for the message.
        signature: how it will be called and what it returns, for the message.

    Raises:
        ValueError: there is no such function.
    """
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that nothing there shadows a library
    try:
        function: object = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, SyntaxError, ValueError) as error:
        raise ValueError(f"{setting}: no such function ({error}); expected module:function, {signature}.") from error
    if not callable(function):
        raise ValueError(f"{setting}: found a {type(function).__name__}; expected a function, {signature}.")
    return function
