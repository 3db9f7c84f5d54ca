"""Writes `docs/configuration.md`, every setting with its type, bounds, default and meaning, from `rlhf/config/`.

    python -m stages.setup.settings_page > docs/configuration.md

The text under a field of a settings class is its meaning there and here. Defaults are what `conf/` composes.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from rlhf.config.bounds import bounds_of
from rlhf.config.data_config import SourceConfig
from rlhf.config.reward_config import RewardSourceConfig
from rlhf.config.run_config import STAGES, USES, RunConfig
from stages.setup.compose import composed

_IN_LISTS = {
    SourceConfig: "an item of `data.STAGE.train` or `eval`",
    RewardSourceConfig: "an item of `ppo.rewards` or `eval.rewards`",
}
"""Classes of mappings that are written in lists."""
_HEAD = """# Every setting

Made from `rlhf/config/` by `python -m stages.setup.settings_page`; do not edit. A setting is given on the command line
as `NAME=VALUE`, with its dotted name, such as `ppo.kl.coef=0.1`; lists are quoted, `'data.sft.train=[a.jsonl,b.csv]'`.
A group of this page may be at several places, and then every place has its own value. Defaults are those of
`experiment=custom`; `python run_pipeline.py --help` shows what another combination has.
"""


def page() -> str:
    """The whole page."""
    values = composed(["experiment=custom", "model.path=MODEL", f"stage=[{','.join([*STAGES, *USES])}]"])
    sections = [_section(cls, places, values=values) for cls, places in _groups().items()]
    contents = [f"* [{_title(places)}](#{_anchor(_title(places))}): {_about(cls)}" for cls, places in _groups().items()]
    return "\n".join([_HEAD, *contents, "", *sections])


def _groups() -> dict[type, list[str]]:
    """Each settings class and its places, in the order of the root; those that are written in lists come last."""
    found: dict[type, list[str]] = defaultdict(list)
    for cls, place in _walk(RunConfig, ""):
        found[cls].append(place)
    return {**found, **{cls: [place] for cls, place in _IN_LISTS.items()}}


def _walk(cls: type, place: str) -> Iterator[tuple[type, str]]:
    yield cls, place
    for name, hint in get_type_hints(cls).items():
        for inner in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                yield from _walk(inner, f"{place}.{name}".lstrip("."))


def _section(cls: type, places: list[str], *, values: DictConfig) -> str:
    rows = ["| setting | values | default | meaning |", "| --- | --- | --- | --- |"]
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name != "selected" and not _is_group(hints[field.name]):
            default = _default(field, places, values=values)
            meaning = _meanings(cls).get(field.name, "").replace("|", "\\|")
            rows.append(f"| `{field.name}` | {_kind(cls, field.name, hints[field.name])} | {default} | {meaning} |")
    if len(rows) == 2:
        return ""
    return f"## {_title(places)}\n\n{_about(cls)}\n\n{_where(cls, places, values=values)}" + "\n".join(rows) + "\n"


def _where(cls: type, places: list[str], *, values: DictConfig) -> str:
    """The places of a class, and which of them take their values from another one."""
    names = [field.name for field in dataclasses.fields(cls)]
    like: dict[str, list[str]] = defaultdict(list)
    for place in places:
        given = {str(_given(values, f"{place}.{name}")) for name in names}
        source = given.pop() if len(given) == 1 else ""
        like[source if source.startswith("as ") else ""].append(f"`{place}`")
    said = [", ".join(found) + f" ({source} until given)" * bool(source) for source, found in like.items()]
    return f"At {'; '.join(said)}.\n\n" if len(places) > 1 else ""


def _title(places: list[str]) -> str:
    return places[0] or "The run"


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return "".join(letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


def _is_group(hint: Any) -> bool:
    return any(dataclasses.is_dataclass(inner) for inner in (hint, *get_args(hint)))


def _kind(cls: type, name: str, hint: Any) -> str:
    """The values that a setting takes, in words."""
    if get_origin(hint) in (Union, UnionType):
        inner = [kind for kind in get_args(hint) if kind is not NoneType]
        return " or ".join(
            [*(_kind(cls, name, kind) for kind in inner), *(["null"] if NoneType in get_args(hint) else [])]
        )
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    bounds = bounds_of(cls).get(name)
    if get_origin(hint) is list:
        return f"list of {_kind(cls, name, get_args(hint)[0])}"
    words = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text", dict: "mapping"}
    word = words.get(get_origin(hint) or hint, "anything")
    return f"{word}: {bounds}".replace("number: a number", "number") if bounds and hint in (int, float) else word


def _default(field: Any, places: list[str], *, values: DictConfig) -> str:
    """The value at each place, once where most agree; of a mapping in a list, the class's default."""
    found = {place: _given(values, f"{place}.{field.name}".lstrip(".")) for place in places}
    own = {place: value for place, value in found.items() if not str(value).startswith("as ")}
    found = own or found
    usual, count = Counter(found.values()).most_common(1)[0]
    if usual is None:
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default
        return "must be given" if default is dataclasses.MISSING else _shown(default)
    others = [f"{place} {value or 'null'}" for place, value in found.items() if value != usual]
    return "; ".join([usual if count > 1 or not others else f"{next(iter(found))} {usual}", *others])


def _given(values: DictConfig, name: str) -> str | None:
    """The value of a setting as it is written; None where there is none."""
    outer, _, last = name.rpartition(".")
    group = OmegaConf.select(values, outer) if outer else values
    node = group._get_node(last) if isinstance(group, DictConfig) else None
    if node is None or node._is_missing():
        return None
    value = node._value()
    by_rank = re.fullmatch(r"\$\{by_rank:\$\{.*\},(.*),(.*)\}", str(value))
    if by_rank:
        return f"`{by_rank[1]}`, with adapters `{by_rank[2]}`"
    reference = re.fullmatch(r"\$\{([\w.]+)\.(\w+)\}", str(value))
    return f"as `{reference[1]}`" if reference and reference[2] == last else _shown(value)


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "`null`" if value is None else "empty"
    if isinstance(value, Enum | bool):
        return f"`{str(value.value if isinstance(value, Enum) else value).lower()}`"
    return f"`{value}`"


def _about(cls: type) -> str:
    """The first sentence of a class's documentation."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


@cache
def _meanings(cls: type) -> dict[str, str]:
    """The text under each field, also of the classes that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for statement, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                assert isinstance(statement.target, ast.Name)
                found[statement.target.id] = " ".join(str(text.value.value).split())
    return found


if __name__ == "__main__":
    sys.stdout.write(page())
