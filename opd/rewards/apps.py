"""Tests as APPS, TACO and Eurus have them: JSON with ``inputs``, ``outputs``, maybe ``fn_name``."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from opd.errors import UserError
from opd.rewards.code import Kind

# What LiveCodeBench has imported before a program starts (its testing_util.py); models rely on it.
_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json"),
)
IMPORTS = "\n".join(
    [
        *(f"from {module} import *" for module in (*_MODULES, "builtins", "typing")),
        *(f"import {module}" for module in _MODULES),
        "sys.setrecursionlimit(50000)",
        "",
    ]
)


@dataclass(frozen=True)
class AppsTests:
    """What such JSON says; see :class:`opd.rewards.CodeTests`."""

    kind: Kind
    cases: tuple[tuple[Any, Any], ...]
    entry_point: str


def read_apps(text: str) -> AppsTests:
    """Read tests: of a program that reads stdin, or of a function where ``fn_name`` names one.

    Arguments and values of a function are those of JSON, or text with the JSON of one argument a
    line. A value that a function must return stands in a list of its own in most rows, and not in
    others: where all outputs of a problem are lists of one, that one is meant.

    Raises:
        UserError: There are none, or they cannot be read.
    """
    try:
        tests = json.loads(text or "{}")
        pairs = list(zip(tests.get("inputs", []), tests.get("outputs", []), strict=True))
        function = tests.get("fn_name") or ""
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError("tests that cannot be read") from error
    if not pairs:
        raise UserError("no tests")
    if not function:
        return AppsTests("stdin", tuple((_lines(i), _lines(o)) for i, o in pairs), "")
    if all(isinstance(part, str) for pair in pairs for part in pair):
        with contextlib.suppress(ValueError):  # else these texts are the values themselves
            pairs = [(list(map(json.loads, i.splitlines())), json.loads(o)) for i, o in pairs]
    single = all(isinstance(output, list) and len(output) == 1 for _, output in pairs)
    cases = tuple(
        (
            arguments if isinstance(arguments, list) else [arguments],
            output[0] if single else output,
        )
        for arguments, output in pairs
    )
    return AppsTests("call", cases, function)


def _lines(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "\n".join(map(str, text))
