"""Where a DeepSpeed configuration comes from: a file, a mapping, or url-safe base64; and its old names, made new.

Old names are those of `keys.py`, and the shapes that have changed: `zero_optimization: true`, `cpu_offload`,
`bfloat16`.
"""

from __future__ import annotations

import base64
import difflib
import stat
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from rlhf.engine.deepspeed.hjson import Document, Path, parse
from rlhf.engine.deepspeed.table import TABLE
from rlhf.engine.deepspeed.values import AUTO, asks, section, switch

_LONG = 200
_OLD_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
_AUTO_SECTIONS = {"offload_optimizer": {"device": AUTO}, "offload_param": {"device": AUTO}, "params": AUTO}
"""What a section means that is `auto` as a whole; any other is as if it were not there."""


def read_deepspeed(source: Any, *, setting: str) -> Document:
    """The configuration that a setting names, under present names.

    Args:
        source: path of a file, url-safe base64 of its text, or a mapping.
        setting: dotted name of the setting, for errors.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    if isinstance(source, Mapping):
        return _present(Document(setting, {str(key): value for key, value in source.items()}))
    if not isinstance(source, str) or not source.strip():
        raise ValueError(f"{setting}={source!r}: expected a DeepSpeed JSON file, or its content as a mapping.")
    path = FilePath(source)
    path = path.expanduser() if source.startswith(("~/", "~\\")) else path
    if stat.S_ISREG(_mode(path)):
        return _present(parse(_text(path.read_bytes(), name=str(path)), name=path.name))
    text = _decoded(source)
    if text is None:
        raise ValueError(_no_file(path, setting))
    return _present(parse(text, name=f"{setting} (base64)"))


def _mode(path: FilePath) -> int:
    """What is there, as `stat` has it; 0 where there is nothing, or where the text is too long to be a path."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def _decoded(source: str) -> str | None:
    """The text that base64 stands for, with or without its last `=`; None where it stands for no settings."""
    source = "".join(source.split())
    try:
        text = base64.b64decode(source + "=" * (-len(source) % 4), altchars=b"-_").decode()
    except ValueError:
        return None
    return text if ":" in text else None


def _text(content: bytes, *, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: is not a text in UTF-8 ({error.reason} at byte {error.start}).") from error


def _no_file(path: FilePath, setting: str) -> str:
    if stat.S_ISDIR(_mode(path)):
        return f"{setting}={path}: is a folder; expected a DeepSpeed JSON file."
    there = [file.name for file in path.parent.glob("*.json")] if stat.S_ISDIR(_mode(path.parent)) else []
    near = difflib.get_close_matches(path.name, there, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
    shown = f"{str(path)[:_LONG]}{'...' if len(str(path)) > _LONG else ''}"
    return f"{setting}={shown}: there is no such file (looked from {FilePath.cwd()}).{hint}"


def _present(document: Document) -> Document:
    """The same configuration without old names and shapes."""
    lines = document.lines
    content = dict(document.content)
    _take_bfloat16(content, lines)
    content = _renamed(content, (), document=document)
    if isinstance(content.get("zero_optimization"), bool):
        content["zero_optimization"] = {"stage": int(content["zero_optimization"])}
        lines["zero_optimization", "stage"] = lines.get(("zero_optimization",), 0)
    new = Document(document.name, content, lines)
    zero = section(content.get("zero_optimization"), where=new.where(("zero_optimization",)))
    if zero:
        content["zero_optimization"] = _with_blocks(dict(zero), new)
    return new


def _renamed(part: Mapping[str, Any], parents: Path, *, document: Document) -> dict[str, Any]:
    """`part` with every key under its present name; the document's lines then have both."""
    lines = document.lines
    new: dict[str, Any] = {}
    for name, value in part.items():
        path = (*parents, str(name))
        present = TABLE.canonical(path)
        if present[-1] in new or (present != path and present[-1] in part):
            raise ValueError(
                f"{document.where(path)}: is an old name of {'.'.join(present)}, which is there too; remove one."
            )
        if present != path and path in lines:
            lines[present] = lines[path]
        if TABLE.is_section(present) and value == AUTO:
            value = _AUTO_SECTIONS.get(present[-1])
        is_section = isinstance(value, Mapping) and TABLE.is_section(present)
        new[present[-1]] = _renamed(value, present, document=document) if is_section else value
    return new


def _take_bfloat16(content: dict[str, Any], lines: dict[Path, int]) -> None:
    old = content.pop("bfloat16", None)
    if old is not None and content.get("bf16") is None:
        content["bf16"] = old
        lines |= {("bf16", *path[1:]): line for path, line in list(lines.items()) if path[0] == "bfloat16"}


def _with_blocks(zero: dict[str, Any], document: Document) -> dict[str, Any]:
    """`cpu_offload: true` is a block with device=cpu."""
    pinned = zero.pop("cpu_offload_use_pin_memory", None)
    for old, block in _OLD_OFFLOADS.items():
        path = ("zero_optimization", old)
        value = zero.pop(old, None)
        if value is None or value == AUTO or not switch(value, where=document.where(path)):
            continue
        given = section(zero.get(block), where=document.where(("zero_optimization", block)))
        if asks(given) and given.get("device") not in ("cpu", AUTO):
            raise ValueError(
                f"{document.where(path)}=true: {block} is there too, with device={given.get('device', 'none')}; remove "
                f"{old}."
            )
        zero[block] = {**given, "device": "cpu"}
        document.lines.setdefault(("zero_optimization", block, "device"), document.lines.get(path, 0))
    if pinned is not None:
        for block in _OLD_OFFLOADS.values():
            if isinstance(zero.get(block), Mapping):
                zero[block] = {"pin_memory": pinned, **zero[block]}
    return zero
