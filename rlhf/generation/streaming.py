"""Text that appears while its tokens are drawn.

A token may end in the middle of a character, and a decoder then shows a replacement character that the next token takes
back. So what could still change is held until it cannot. Left out: what a terminal must not see (`tracking/table.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_HELD = 3  # a character has four bytes at most, so three may wait for the last
_WINDOW = 32  # tokens that are decoded again with each new one
_CONTEXT = 8  # of them, those that stay when the window moves: some decoders look at what is before


class TextStream:
    """The text of a sequence that grows token by token, in pieces that are never taken back."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Nothing was said yet; `decode` makes text of tokens."""
        self.text = ""
        """Every piece so far."""
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that are in `text`

    def add(self, token: int) -> str:
        """The text that is certain since `token`, often none."""
        self._window.append(token)
        decoded = self._decode(self._window)
        complete = decoded.rstrip(_REPLACEMENT)
        certain = decoded[: max(len(complete), len(decoded) - _HELD)]
        piece = self._take(certain)
        if certain == decoded and len(self._window) > _WINDOW:
            del self._window[:-_CONTEXT]
            self._shown = len(self._decode(self._window))
        return piece

    def rest(self) -> str:
        """What was held, now that nothing follows."""
        return self._take(self._decode(self._window))

    def _take(self, decoded: str) -> str:
        piece = decoded[self._shown :]
        self._shown = max(self._shown, len(decoded))
        self.text += piece
        return piece
