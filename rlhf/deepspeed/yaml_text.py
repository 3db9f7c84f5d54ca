"""Reads a configuration that is written as YAML; every key keeps its line, and a key that occurs twice is refused."""

from __future__ import annotations

from typing import Any

import yaml

from rlhf.deepspeed.hjson import Document, Path

_DEPTH = 100


def parse_yaml(text: str, *, name: str) -> Document:
    """Read a text whose top level is a mapping.

    Args:
        text: the text.
        name: what errors call it.

    Raises:
        ValueError: file and line, what was found and what was expected.
    """
    loader = yaml.SafeLoader(text)
    lines: dict[Path, int] = {}
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{name}: is not a mapping; expected settings, as in `zero_optimization: {{stage: 2}}`.")
        content = _members(root, (), name=name, loader=loader, lines=lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(f"{name}{f':{mark.line + 1}' if mark else ''}: is not YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: is not YAML: {error}.") from error
    return Document(name, content, lines)


def _members(
    node: yaml.MappingNode, path: Path, *, name: str, loader: yaml.SafeLoader, lines: dict[Path, int]
) -> dict[str, Any]:
    if len(path) > _DEPTH:
        raise ValueError(f"{name}:{node.start_mark.line + 1}: is nested too deeply; expected at most {_DEPTH} levels.")
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if str(key.value) in seen:
            raise ValueError(
                f"{name}:{line}: {'.'.join((*path, str(key.value)))} is there twice, first on line "
                f"{seen[str(key.value)]}; expected each key once. Remove one of them."
            )
        seen[str(key.value)] = line
    loader.flatten_mapping(node)  # `<<: *other`, which own keys win over
    node.value = list({str(key.value): (key, value) for key, value in node.value}.values())
    content: dict[str, Any] = {}
    for key, value in node.value:
        here = (*path, str(key.value))
        lines[here] = key.start_mark.line + 1
        is_mapping = isinstance(value, yaml.MappingNode)
        content[here[-1]] = (
            _members(value, here, name=name, loader=loader, lines=lines)
            if is_mapping
            else loader.construct_object(value, deep=True)
        )
    return content
