"""How a run is interrupted: the first SIGTERM or SIGINT ends it after the step, the second at once.

Left out: what is saved then (`checkpointing.py`), and how signals reach several ranks (`launch.py`).
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
    """The run was interrupted and has saved itself; on all ranks alike."""


class GracefulStop:
    """While listened to, a signal asks for a stop instead of causing one."""

    def __init__(self, *, speaks: bool) -> None:
        """With `speaks`, say on stderr that a signal has arrived."""
        self.asked = False
        self._speaks = speaks
        self._earlier: dict[int, Any] = {}

    def listen(self) -> None:
        """From now on."""
        if threading.current_thread() is threading.main_thread():  # python allows no other to handle signals
            self._earlier = {number: signal.signal(number, self._hear) for number in _SIGNALS}

    def release(self) -> None:
        """Signals do what they did before."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True
        if self._speaks:
            os.write(2, _NOTICE)
