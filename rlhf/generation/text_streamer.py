"""Streams text while its tokens are drawn.

A token may end in the middle of a character, and a decoder then shows a replacement character that the next token takes
back. So what could still change is held until it cannot. Left out: what a terminal must not see (`tracking/table.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
_HELD = 3  # a character has four bytes at most, so three tokens may wait for the last
_WINDOW = 32  # tokens that are decoded again with each new one
_CONTEXT = 8  # of them, those that stay when the window moves: some decoders look at what is before


class TextStream:
    """The text of a sequence that grows token by token, in pieces that are never taken back."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """Start with no text; `decode` turns token ids into text."""
        self.text = ""
        """Every piece so far."""
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that are in `text`

    def add(self, token: int) -> str:
        """The text that is certain since `token`, often none."""
        self._window.append(token)
        piece = self._take(self._certain())
        if len(self._window) > _WINDOW:
            self._move()
        return piece

    def rest(self) -> str:
        """The text that was held back, once no token follows."""
        return self._take(self._decode(self._window))

    def _certain(self) -> str:
        """The text up to the last token that ends with a character; of bytes that are no text, all that must stay so.

        It is decoded without the tokens after it: some decoders give up a whole run of bytes for an unfinished one.
        """
        whole = decoded = self._decode(self._window)
        for held in range(1, _HELD + 1):
            if not decoded.endswith(_REPLACEMENT):
                return decoded
            decoded = self._decode(self._window[:-held])
        return decoded if not decoded.endswith(_REPLACEMENT) else whole[:-_HELD]

    def _move(self) -> None:
        """Drop old tokens, where those that stay begin with a character and nothing is held."""
        for start in range(len(self._window) - _CONTEXT - _HELD, len(self._window) - _CONTEXT + 1):
            kept = self._decode(self._window[start:])
            if not kept.startswith(_REPLACEMENT) and not kept.endswith(_REPLACEMENT):
                del self._window[:start]
                self._shown = len(kept)
                return

    def _take(self, decoded: str) -> str:
        piece = decoded[self._shown :]
        self._shown = max(self._shown, len(decoded))
        self.text += piece
        return piece
