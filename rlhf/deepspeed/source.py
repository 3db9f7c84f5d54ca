"""Where a DeepSpeed configuration comes from: a file, a mapping, or url-safe base64; and its old names, made new.

A file is JSON in the wide sense of `hjson.py`, or YAML. One of Accelerate is read for what it says of DeepSpeed.

Old names are those of `keys.py`, and the shapes that have changed: `zero_optimization: true`, `cpu_offload`,
`bfloat16`.
"""

from __future__ import annotations

import base64
import difflib
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from rlhf.deepspeed.accelerate import deepspeed_part, is_accelerates, joined
from rlhf.deepspeed.foreign import refuse_foreign
from rlhf.deepspeed.hjson import Document, Path, has_braces, leaves, parse
from rlhf.deepspeed.key_table import TABLE
from rlhf.deepspeed.values import AUTO, asks, section, switch
from rlhf.deepspeed.yaml_text import parse_yaml

_LONG = 200
_YAML = (".yaml", ".yml")
_OLD_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
_AUTO_SECTIONS = {"offload_optimizer": {"device": AUTO}, "offload_param": {"device": AUTO}, "params": AUTO}
"""What a section means that is `auto` as a whole; any other is as if it were not there."""


def read_deepspeed(source: Any, *, setting: str) -> Document:
    """The configuration that a setting names, under present names.

    Args:
        source: path of a file, url-safe base64 of its text, or a mapping.
        setting: dotted name of the setting, for errors.

    Raises:
        ValueError: there is no such file, it cannot be read, or it is a configuration of something else.
    """
    document = _read(source, setting=setting)
    if not is_accelerates(document.content):
        refuse_foreign(document)
        return _present(document)
    part = deepspeed_part(document)
    if part.file is None:
        return _present(part.document)
    name = document.where(("deepspeed_config", "deepspeed_config_file"))
    file = FilePath(part.file)
    beside = FilePath(str(source)).parent / file
    inner = _read(
        str(beside if isinstance(source, str) and not file.exists() and beside.exists() else file), setting=name
    )
    refuse_foreign(inner)
    return joined(part.document, _present(inner))


def _read(source: Any, *, setting: str) -> Document:
    """What is written, and where."""
    if isinstance(source, Mapping):
        return _with_leaves(Document(setting, {str(key): value for key, value in source.items()}))
    if not isinstance(source, str) or not source.strip():
        raise ValueError(f"{setting}={source!r}: expected a DeepSpeed JSON file, or its content as a mapping.")
    path = FilePath(source)
    path = path.expanduser() if source.startswith(("~/", "~\\")) else path
    if stat.S_ISREG(_mode(path)):
        text = _text(path.read_bytes(), name=str(path))
        return _parsed(text, name=path.name, is_yaml=path.suffix.lower() in _YAML)
    decoded = _decoded(source)
    if decoded is None:
        raise ValueError(_no_file(path, setting))
    return _parsed(decoded, name=f"{setting} (base64)", is_yaml=False)


def _parsed(text: str, *, name: str, is_yaml: bool) -> Document:
    """With braces it is Hjson, whatever it is called; without, YAML where it is called so, or is Accelerate's."""
    if not has_braces(text) and (is_yaml or is_accelerates(parse(text, name=name).content)):
        return _with_leaves(parse_yaml(text, name=name))
    return _with_leaves(parse(text, name=name))


def _with_leaves(document: Document) -> Document:
    return replace(document, written=leaves(document.content))


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
    beside = path.parent.iterdir() if stat.S_ISDIR(_mode(path.parent)) else []
    there = [file.name for file in beside if file.suffix in (".json", *_YAML)]
    near = difflib.get_close_matches(path.name, there, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
    shown = f"{str(path)[:_LONG]}{'...' if len(str(path)) > _LONG else ''}"
    return f"{setting}={shown}: there is no such file (looked from {FilePath.cwd()}).{hint}"


def _present(document: Document) -> Document:
    """The same configuration without old names and shapes."""
    content = dict(document.content)
    new = replace(document, content=content)
    _take_bfloat16(content, new)
    renamed = _renamed(content, (), document=new)
    content.clear()
    content.update(renamed)
    if isinstance(content.get("zero_optimization"), bool):
        content["zero_optimization"] = {"stage": int(content["zero_optimization"])}
        new.move(("zero_optimization",), ("zero_optimization", "stage"))
    zero = section(content.get("zero_optimization"), where=new.where(("zero_optimization",)))
    if zero:
        content["zero_optimization"] = _with_blocks(dict(zero), new)
    return new


def _renamed(part: Mapping[str, Any], parents: Path, *, document: Document) -> dict[str, Any]:
    """`part` with every key under its present name."""
    new: dict[str, Any] = {}
    for name, value in part.items():
        path = (*parents, str(name))
        present = TABLE.canonical(path)
        if present[-1] in new or (present != path and present[-1] in part):
            raise ValueError(
                f"{document.where(path)}: is an old name of {'.'.join(present)}, which is there too; remove one."
            )
        if present != path:
            document.move(path, present)
        if TABLE.is_section(present) and value == AUTO:
            value = _AUTO_SECTIONS.get(present[-1])
            if isinstance(value, Mapping):
                document.move(path, (*present, *value))
        is_section = isinstance(value, Mapping) and TABLE.is_section(present)
        new[present[-1]] = _renamed(value, present, document=document) if is_section else value
    return new


def _take_bfloat16(content: dict[str, Any], document: Document) -> None:
    if "bfloat16" not in content:
        return
    old = content.pop("bfloat16")
    paths = [("bfloat16",), *(path for path in document.written if path[0] == "bfloat16")]
    if old is not None and content.get("bf16") is None:
        content["bf16"] = old
        document.became.update({path: ("bf16", *path[1:]) for path in paths})
    else:
        document.idle.update(dict.fromkeys(paths, "the old name of bf16, which stands where it is there too"))


def _with_blocks(zero: dict[str, Any], document: Document) -> dict[str, Any]:
    """`cpu_offload: true` is a block with device=cpu."""
    for old, block in _OLD_OFFLOADS.items():
        path = ("zero_optimization", old)
        value = zero.pop(old, None)
        if value is None or value == AUTO:
            continue
        if not switch(value, where=document.where(path)):
            document.idle.update(dict.fromkeys(document.written_at(path), f"false: {block} decides"))
            continue
        given = section(zero.get(block), where=document.where(("zero_optimization", block)))
        if asks(given) and given.get("device") not in ("cpu", AUTO):
            raise ValueError(
                f"{document.where(path)}=true: {block} is there too, with device={given.get('device', 'none')}; remove "
                f"{old}."
            )
        zero[block] = {**given, "device": "cpu"}
        document.move(path, ("zero_optimization", block, "device"))
    _spread_pinning(zero, document)
    return zero


def _spread_pinning(zero: dict[str, Any], document: Document) -> None:
    """`cpu_offload_use_pin_memory` is `pin_memory` of each block that does not say it itself."""
    path = ("zero_optimization", "cpu_offload_use_pin_memory")
    pinned = zero.pop(path[-1], None)
    if pinned is None or pinned == AUTO:
        return
    switch(pinned, where=document.where(path))
    silent = [
        name
        for name in _OLD_OFFLOADS.values()
        if isinstance(zero.get(name), Mapping) and "pin_memory" not in zero[name]
    ]
    for name in silent:
        zero[name] = {"pin_memory": pinned, **zero[name]}
        document.move(path, ("zero_optimization", name, "pin_memory"))
    if not silent:
        document.idle[path] = "there is no offload block that says nothing of pin_memory"
