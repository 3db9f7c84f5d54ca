"""What a kill leaves of the log of an offline W&B run, made fit to be synced.

W&B writes blocks of 32 KiB, so the last record of a killed run is torn. `wandb sync` gives up at it, and does not even
begin with the log of the resumed run. Left out: what the records say (`wandb leet inspect` shows it).
"""

from __future__ import annotations

import os
from pathlib import Path

_HEADER = b":W&B\xe1\xbe\x00"
_BLOCK = 32 * 1024
_LABEL = 7  # before each fragment: checksum (4 bytes), length (2), kind (1)
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def cut_torn_record(log: Path) -> bool:
    """Cut off a record that is not whole; whether any record is left.

    A log that is written in another way than this file knows stays as it is.
    """
    data = log.read_bytes()
    size = _whole_size(data)
    if size < len(data):
        os.truncate(log, size)
    return size > len(_HEADER)


def _whole_size(data: bytes) -> int:
    """Bytes up to the end of the last whole record."""
    if not data.startswith(_HEADER):
        return len(data)
    at = end = len(_HEADER)
    while at + _LABEL <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _LABEL:  # too short for a label: filled up with zeros
            at += left
            continue
        kind = data[at + 6]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return len(data)
        at += _LABEL + int.from_bytes(data[at + 4 : at + 6], "little")
        if at <= len(data) and kind in (_FULL, _LAST):
            end = at
    return end
