"""Turns whatever `engine.deepspeed` names into one configuration of DeepSpeed under present names.

A configuration of Hugging Face Accelerate becomes what its DeepSpeedPlugin makes of it. Configurations of trainers and
of anything else are refused by name: DeepSpeed takes no notice of keys at the top level that it does not know, so many
of them would otherwise pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

from rlhf.deepspeed import keys
from rlhf.deepspeed.keys import ACCELERATE, AUTO, TABLE, Decision, Path, check_value, choice, section, switch
from rlhf.deepspeed.reader import Document, is_accelerates, leaves, read

COMMENTS = ("_", "comment", "//", "#")
"""How keys begin that stand for comments."""
_PLUGIN = "deepspeed_config"
_FILE = (_PLUGIN, "deepspeed_config_file")
_STAGE = ("zero_optimization", "stage")
_MANY = 5  # names in an error


def read_deepspeed(source: Any, *, setting: str) -> Document:
    """The configuration that a setting names, under present names.

    Args:
        source: path of a file, url-safe base64 of its text, or a mapping.
        setting: dotted name of the setting, for errors.

    Raises:
        ValueError: there is no such file, it cannot be read, or it is a configuration of something else.
    """
    document = read(source, setting=setting)
    if not is_accelerates(document.content):
        return _renewed(document)
    outer, file = _from_accelerate(document), _named_file(document)
    if file is None:
        return outer
    named = FilePath(file)
    beside = FilePath(str(source)).parent / named
    found = beside if isinstance(source, str) and not named.exists() and beside.exists() else named
    return _joined(outer, _renewed(read(str(found), setting=document.where(_FILE))))


# Configurations of Accelerate.


def _named_file(document: Document) -> str | None:
    """The DeepSpeed file that a configuration of Accelerate names."""
    file = document.written.get(_FILE)
    return None if file in (None, "", "none") else str(file)


def _from_accelerate(document: Document) -> Document:
    """What a configuration of Accelerate says about DeepSpeed, without the file that it may name."""
    _require_deepspeed(document)
    section(document.content.get(_PLUGIN), where=document.where((_PLUGIN,)))
    new, file = replace(document, content={}), _named_file(document)
    for path in document.written:
        if path != (_PLUGIN,):  # null
            _take(path, document, new=new)
    if file is None and _FILE in new.unused:
        new.unused[_FILE] = "none"
    _set_precision(document, new)
    if file is None and _get(new.content, _STAGE) is None:
        _put(new.content, _STAGE, value=2)
        new.notes.append(f"{document.where((_PLUGIN,))}: has no zero_stage; it is 2, as in Accelerate")
    return new


def _take(path: Path, document: Document, *, new: Document) -> None:
    """Decide about one value of Accelerate, by the table."""
    key, value = ACCELERATE.above(path), document.written[path]
    if key is None and path[0] == _PLUGIN:
        raise ValueError(f"{document.where(path)}: there is no such key{ACCELERATE.hint(path[:2])}")
    if key is None:
        new.unused[path] = "neither Accelerate nor this run reads it"
        new.notes.append(f"{document.name}: neither Accelerate nor this run reads {'.'.join(path)}")
        return
    if value is not None:
        check_value(value, key=key, path=path, where=document.where)
    if key.setting:
        new.renamed[path] = tuple(key.setting.split("."))
        is_none = value == "none" and path[-1].endswith("_path")
        _put(new.content, new.renamed[path], value=None if is_none else value)
    elif key.decision is Decision.ignored or path == _FILE:
        new.unused[path] = key.note


def _require_deepspeed(document: Document) -> None:
    raw = document.content.get("distributed_type", "DEEPSPEED")
    kind = "NO" if raw is False else str(raw).upper()  # NO without quotes is false in YAML
    if kind == "DEEPSPEED" and document.content.get("compute_environment") != "AMAZON_SAGEMAKER":
        return
    advice = keys.INSTEAD_OF_ACCELERATES.get(
        kind, "choose the engine here, as in engine=zero2 or engine=zero3, and start with launch.ranks"
    )
    raise ValueError(
        f"{document.name}: is a configuration of Hugging Face Accelerate with distributed_type={kind}; expected one "
        f"for DEEPSPEED. Leave engine.deepspeed out: {advice}."
    )


def _set_precision(document: Document, new: Document) -> None:
    """`mixed_precision`, or the `fp16` of old files; without either, the run's own stands."""
    path, value = ("mixed_precision",), document.content.get("mixed_precision")
    old = document.content.get("fp16")
    if value is not None and "fp16" in document.content:
        new.unused["fp16",] = "mixed_precision says it"
    elif value is None and old is not None:
        path, value = ("fp16",), "fp16" if switch(old, where=document.where(("fp16",))) else "no"
    if value is None:
        return
    word = "no" if value is False else str(value).lower()  # `no` without quotes is false in YAML
    if word == AUTO:
        new.unused[path] = "auto: the run's own"
        return
    choice(word, among=("no", "fp16", "bf16"), where=document.where(path))
    new.content.update({half: {"enabled": word == half} for half in ("fp16", "bf16")})
    new.renamed[path] = ("fp16" if word == "no" else word, "enabled")


def _joined(outer: Document, inner: Document) -> Document:
    """The file that `deepspeed_config_file` names, with what Accelerate's own fills in.

    Raises:
        ValueError: the two contradict each other.
    """
    content = dict(inner.content)
    unused = outer.unused | inner.unused
    is_full_precision = outer.content.get("fp16") == outer.content.get("bf16") == {"enabled": False}
    for path, value in leaves(outer.content).items():
        there = _get(content, path)
        if value in (None, AUTO) or str(there).lower() == str(value).lower():
            continue
        if there in (None, AUTO):
            _put(content, path, value=value)
        elif is_full_precision and path[-1] == "enabled":
            unused |= dict.fromkeys(outer.written_at(path), f"{inner.name} sets the precision")
        else:
            # mixed_precision=bf16 also says fp16.enabled=false.
            own = next(old for old, new in outer.renamed.items() if new == path or new[1:] == path[1:] == ("enabled",))
            raise ValueError(
                f"{outer.where(outer.renamed[own])}={outer.written[own]}: but {inner.where(path)}={there}; expected "
                f"the same. Remove the first, or write auto for the second."
            )
    return Document(
        inner.name,
        content,
        places=inner.places | outer.places,
        written=outer.written | inner.written,
        renamed=outer.renamed | inner.renamed,
        unused=unused,
        notes=outer.notes + inner.notes,
        named_by=outer.name,
    )


def _get(content: Mapping[str, Any], path: Path) -> Any:
    value: Any = content
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _put(content: dict[str, Any], path: Path, *, value: Any) -> None:
    """Set a value; sections on the way are copied, for others may hold them."""
    for name in path[:-1]:
        part = content.get(name)
        content[name] = dict(part) if isinstance(part, Mapping) else {}
        content = content[name]
    content[path[-1]] = value


# Configurations of something else.


def _refuse_foreign(document: Document) -> None:
    content = {name: value for name, value in document.content.items() if not name.startswith(COMMENTS)}
    if not content or any(_is_deepspeeds(name, value) for name, value in content.items()):
        return
    for trainer, names in keys.TRAINERS.items():
        marks = [name for name in content if name in names]
        if marks:
            other = "Give the DeepSpeed file that belongs to it, or choose the engine here, as in engine=zero2 or "
            raise ValueError(
                f"{document.name}: is a configuration of {trainer}, with {_some(marks)}, not one of DeepSpeed. "
                f"{_instead(content) or f'{other}engine=zero3.'}"
            )
    if not any(TABLE.knows((name,)) for name in content):
        hints = _some(f"{name}{TABLE.hint((name,))}" for name in content)
        raise ValueError(
            f"{document.name}: found {hints} at the top level, none of which is a key of DeepSpeed; expected keys such "
            f"as zero_optimization, bf16 or train_batch_size. {_instead(content)}".rstrip()
        )


def _is_deepspeeds(name: str, value: Any) -> bool:
    """Whether a key at the top level is there for DeepSpeed and for nothing else."""
    path = TABLE.canonical((name,))
    if TABLE.is_section(path) and isinstance(value, Mapping):
        return any(TABLE.knows((*path, str(child))) for child in value)
    return TABLE.knows(path) and name not in keys.SHARED_WITH_TRAINERS


def _instead(content: Mapping[str, Any]) -> str:
    inside = _inside(content)
    if inside:
        return f"What stands in its {inside!r} is one: give that alone."
    named = content.get("deepspeed")
    if isinstance(named, str) and named not in ("", "none", AUTO):
        return f"Its 'deepspeed' names the file to give instead: engine.deepspeed={named}."
    return ""


def _inside(content: Mapping[str, Any]) -> str:
    """The dotted name of the first section that could be DeepSpeed's; empty where there is none."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            if any(_is_deepspeeds(str(key), part) for key, part in value.items()):
                return name
            if inside := _inside(value):
                return f"{name}.{inside}"
    return ""


def _some(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:_MANY]) + (f" and {len(found) - _MANY} more" if len(found) > _MANY else "")


# Old names and shapes.


def _renewed(document: Document) -> Document:
    """The same configuration without old names, and `zero_optimization: true` as a section."""
    new = replace(document, content=dict(document.content))
    _rename_bfloat16(new)
    _refuse_foreign(new)
    new = replace(new, content=_renamed(new.content, (), document=new))
    zero = new.content.get("zero_optimization")
    if isinstance(zero, bool):
        new.content["zero_optimization"] = {"stage": int(zero)}
        new.rename(("zero_optimization",), _STAGE)
    return new


def _rename_bfloat16(document: Document) -> None:
    content = document.content
    if "bfloat16" not in content:
        return
    old = content.pop("bfloat16")
    paths = [("bfloat16",), *(path for path in document.written if path[0] == "bfloat16")]
    if old is not None and content.get("bf16") is None:
        content["bf16"] = old
        document.renamed.update({path: ("bf16", *path[1:]) for path in paths})
    else:
        document.unused.update(dict.fromkeys(paths, "the old name of bf16, which stands where it is there too"))


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
            document.rename(path, present)
        is_section = isinstance(value, Mapping) and TABLE.is_section(present)
        new[present[-1]] = _renamed(value, present, document=document) if is_section else value
    return new
