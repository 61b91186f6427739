"""Recipes, presets and studies by name: ``--config quickstart`` is ``configs/quickstart.yaml``.

``configs/`` lies beside ``opd/``, in a checkout as in an installed wheel, so a name works from any
folder. A path is a path: a file of the working directory comes first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # lazily exported

from opd.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
SUITES = "eval"
KINDS = ("study", SUITES)  # folders of names that `opd study` and `opd evaluate --suite` take alone
LITERAL = "{:\n"  # of these a name has none, and YAML written out has one


def names(kind: str = "") -> list[str]:
    """Names of the recipes and presets that are installed, or of a kind of its own."""
    found = [path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.yaml")]
    return sorted(
        name.as_posix()
        for name in found
        if (name.parts[0] if name.parts[0] in KINDS else "") == kind
    )


def find(text: str, option: str = "--config", *, kind: str = "") -> str:
    """Find a configuration.

    Args:
        text: Path of a file, or name of one in configs/.
        option: What it was given for, for messages.
        kind: What it is to be: one of KINDS, or a recipe.

    Returns:
        Path of the file.

    Raises:
        UserError: There is neither.
    """
    if Path(text).expanduser().is_file():
        return str(Path(text).expanduser())
    known = names(kind)
    suites = [f"{SUITES}/{text}"] if kind == SUITES else []  # a suite's name needs no folder
    for name in (text, *suites):
        if name in known:
            return str(CONFIGS / f"{name}.yaml")
    name = text.removeprefix("configs/").removesuffix(".yaml")
    if name in known:
        raise UserError(f"{option} {text}: there is no such file here; by name it is {name}")
    raise UserError(
        f"{option} {text}: there is no such file, nor a configuration of that name; there are "
        f"{', '.join(known)}"
    )


def check_yaml(text: str, where: str) -> None:
    """Refuse what holds no options, or a key twice, of which the first would go without a word.

    Raises:
        UserError: It is such, or no YAML at all.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is no YAML ({' '.join(str(error).split())})") from error
    if node is None:
        raise UserError(f"{where}: is empty; it must hold options, as KEY: VALUE")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{where}: must hold options, as KEY: VALUE")
    _check_node(node, where)


def _check_node(node: yaml.Node | None, where: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _check_node(part, where)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(
                    f"{where} line {line}: the key {key.value!r} is already there in line "
                    f"{lines[key.value]}; put both together"
                )
            lines[key.value] = line
            _check_node(value, where)


class ConfigAction(ActionConfigFile):
    """``--config``: a path, a name, or YAML written out."""

    kind = ""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        if set(LITERAL) & set(values):
            check_yaml(values, "--config")
        else:
            values = find(values, kind=self.kind)
            check_yaml(Path(values).read_text(encoding="utf-8", errors="replace"), values)
        super().__call__(parser, cfg, values, option_string)


class StudyAction(ConfigAction):
    """``--config`` of ``opd study``."""

    kind = "study"
