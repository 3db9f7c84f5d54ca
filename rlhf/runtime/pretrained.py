"""What other people's model folders hold, read by transformers: no code of theirs is run, and nobody is asked to.

Left out: the weights (`rlhf/models/model_folder.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NEEDS_CODE = (
    "it needs code that it brings along, which is never run here. Choose a model that transformers knows by itself, or "
    "convert it once where you trust its code."
)


def load_auto(auto_class: Any, path: str | Path, *, complaint: str, **options: Any) -> Any:
    """`auto_class.from_pretrained(path)` for an `Auto...` class of transformers.

    Args:
        auto_class: `AutoConfig`, `AutoTokenizer`, ...
        path: a folder, or a hub id.
        complaint: how the sentence about a failure begins.
        **options: more arguments of `from_pretrained`.

    Raises:
        ValueError: `complaint`, and why: a file is missing or damaged, or the model needs code of its own.
    """
    with reading(complaint):
        return auto_class.from_pretrained(path, trust_remote_code=False, **options)


@contextmanager
def reading(complaint: str) -> Iterator[None]:
    """Turn any error inside into a ValueError: libraries raise of every kind over a file that is damaged."""
    try:
        yield
    except Exception as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{complaint} {_NEEDS_CODE if 'trust_remote_code' in str(error) else said}") from error
