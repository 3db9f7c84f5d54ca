"""Files that are written whole or not at all, checked against checksums, and named in the message when they fail."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlhf.runtime.errors import RunError, file_error

Seal = dict[str, dict[str, Any]]
"""`size` in bytes and `sha256` of each file, by its path below the sealed folder."""

_LARGE = 64 << 20
"""Bytes from which hashing takes so long that the result is remembered, as long as the file does not change."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the operating system inside into a RunError that names `path`."""
    try:
        yield
    except Exception as error:
        sentence = file_error(error, f"{path} cannot be written")
        if sentence is None:
            raise
        raise RunError(sentence) from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text; a lone surrogate, which UTF-8 cannot hold, is written with a backslash, as in JSON."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a whole file or nothing, and make its folder; RunError if it cannot be written."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # other ranks may write the same file
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)  # atomic: readers see the old file or the new one
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: Path, *, mend: str = "Bring it back from a copy, or remove it.") -> dict[str, Any]:
    """The JSON object in `path`; empty if there is no such file.

    Raises:
        ValueError: it cannot be read, was cut, or is no JSON object; the message ends with `mend`, what to do then.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(file_error(error, f"{path} cannot be read")) from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}). {mend}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: found a {type(content).__name__}, expected a JSON object. {mend}")
    return content


def seal(files: Iterable[Path], *, root: Path) -> Seal:
    """Sizes and checksums of `files`, all below `root`."""
    listed = sorted(files)
    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter's lock
        digests = list(threads.map(sha256, listed))
    return {
        file.relative_to(root).as_posix(): {"size": file.stat().st_size, "sha256": digest}
        for file, digest in zip(listed, digests, strict=True)
    }


def broken_seal(root: Path, expected: Seal) -> str:
    """Which file below `root` differs from its seal, and how; empty if none does."""
    for name, known in expected.items():
        file = root / name
        if not file.is_file():
            return f"{file} is missing"
        size = file.stat().st_size
        if size != known["size"]:  # found without reading anything
            return f"{file} has {size} bytes; expected {known['size']}"
    found = seal([root / name for name in expected], root=root)
    changed = [name for name in expected if found[name]["sha256"] != expected[name]["sha256"]]
    return f"{root / changed[0]} is not what was written: its checksum differs" if changed else ""


def sha256(file: Path) -> str:
    """SHA-256 of the content; a large file that has not changed since this process hashed it is not read again."""
    status = file.stat()
    version = (status.st_ino, status.st_size, status.st_mtime_ns)
    return (_remembered if status.st_size > _LARGE else _digest)(file, version)


def _digest(file: Path, version: tuple[int, int, int]) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


_remembered = lru_cache(maxsize=1024)(_digest)
