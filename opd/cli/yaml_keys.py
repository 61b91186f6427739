"""YAML as it was meant: a key that stands twice in a mapping is refused, not silently dropped."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import set_loader
from jsonargparse._loaders_dumpers import get_yaml_default_loader, yaml_load  # no public name

from opd.errors import UserError


def refuse_repeated_keys() -> None:
    """Let every YAML file of a command be read by :func:`load`."""
    set_loader("yaml", load, (yaml.YAMLError,))


def load(text: str) -> Any:
    """Read YAML as jsonargparse does.

    Raises:
        UserError: A mapping has a key twice.
        yaml.YAMLError: It is no YAML.
    """
    if "\n" in text:  # a file, rather than one option's value
        _check(yaml.compose(text, Loader=get_yaml_default_loader()))
    return yaml_load(text)


def _check(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _check(part)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise UserError(
                    f"line {line}: the key {key.value!r} is already there in line "
                    f"{seen[key.value]}; put both together"
                )
            seen[key.value] = line
            _check(value)
