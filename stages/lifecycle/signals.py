"""Graceful interruption: the first SIGTERM or SIGINT stops the run after the current step, the second one at once.

See also: `checkpointing.py`, which saves the run then, and `launch.py`, which passes signals on to the ranks.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

_NOTICE = b"\nstopping after this step; a second signal stops at once, without a checkpoint\n"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The run was interrupted and has saved a checkpoint; raised on all ranks alike."""


class GracefulStop:
    """Between `listen` and `release`, a signal asks for a stop instead of ending the process."""

    def __init__(self, *, prints: bool) -> None:
        """Args: `prints`: acknowledge a signal on stderr."""
        self.asked = False
        self._prints = prints
        self._earlier: dict[int, Any] = {}

    def listen(self) -> None:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():  # python allows no other to handle signals
            self._earlier = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def release(self) -> None:
        """Restore the earlier handlers."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True
        if self._prints:
            os.write(2, _NOTICE)
