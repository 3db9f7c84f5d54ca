"""Chat: a conversation with a model in the terminal."""

from __future__ import annotations

from rlhf.config import RunConfig


def run_chat(run: RunConfig) -> None:
    """Talk until the input ends."""
    raise NotImplementedError
