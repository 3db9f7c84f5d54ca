"""Optimizer steps that run while the next batch computes, one step late (the delayed update of ZeRO-Offload).

The gradient of step t is applied in the background, and reaches the working weights when step t + 1 is taken: that
step's gradient was computed with weights that do not know step t yet. Everything else is AdamW: each gradient with
its own learning rate and clipping, in order. The loss falls later by about a step, and the largest learning rate that
is stable is smaller; publishing more often than each step (see below) shortens the delay, so it changes the numbers.
Evaluation and generation have the weights published first (`AdamW.flush`). A checkpoint does not, or it would change
the run: it holds the weights without the update as well.
Left out: what runs (`adamw.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """One job at a time, beside the caller."""

    def __init__(self) -> None:
        """Start idle."""
        self._thread = ThreadPoolExecutor(1, "delayed update")
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Run `job`; the last one must have been finished."""
        assert self._job is None, "a job is under way"
        self._job = self._thread.submit(job)

    def finish(self) -> bool:
        """Wait for the job, if there is one, and say whether there was; what it raised is raised here."""
        job, self._job = self._job, None
        if job is None:
            return False
        job.result()
        return True

    def close(self) -> None:
        """Finish, and end the thread."""
        self._thread.shutdown()
        self.finish()
