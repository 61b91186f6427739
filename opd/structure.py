r"""Read what an answer consists of: a list, a tuple, an interval, a set, a matrix, named values.

Only the structure is read; a leaf remains text. `opd/equality.py` says which structures are equal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

DEEPEST = 30  # brackets within brackets
COMMAND = re.compile(r"\\[A-Za-z]+")

_OPEN, _CLOSE = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
_TOKEN = re.compile(r"\\(?:begin|end)\{\w+\*?\}|\\[A-Za-z]+|\\.|.", re.DOTALL)
_GREEK = r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|psi|omega)"
_LETTER = rf"(?:[A-Za-z]|{_GREEK})(?:_\{{\w+\}})?"
_VARIABLE = re.compile(_LETTER)
_NAME = re.compile(  # x, a_{1}, f(x), S', AB, \text{Area}, Area, \angle ABC, |AB|, (x,y)
    rf"{_LETTER}'*(?:\((?:{_LETTER}|\d+)(?:,{_LETTER})*\))?|[A-Z]{{2,}}|[A-Za-z]{{3,}}"
    rf"|m?\\angle ?[A-Z]+|\|?[A-Z]{{2}}\||\\(?:overline|text)\{{[A-Za-z ]+\}}"
    rf"|\({_LETTER}(?:,{_LETTER})+\)"
)
_MATRIX = re.compile(
    r"[(\[]?\\begin\{([pbBv]?matrix|array)\}(?:\{[lcr|]*\})?((?:(?!\\begin).)*)\\end\{\1\}[)\]]?"
)


@dataclass(frozen=True)
class Structure:
    """A part of an answer.

    Args:
        kind: leaf, list, set, union, chain (values that are said to be equal), matrix, or the two
            brackets of a tuple or interval, such as `[)`.
        text: What it was read from, for a leaf.
        parts: What it consists of.
        name: What is said to have this value: the `x` of `x = 3`.
    """

    kind: str
    text: str
    parts: tuple[Structure, ...] = ()
    name: str | None = None


def dense(text: str) -> str:
    """Drop the spaces that separate neither two words nor two numbers."""
    return re.sub(
        r" (?=[^A-Za-z\d])|(?<=[^A-Za-z\d]) |(?<=\d) (?=[A-Za-z])|(?<=[A-Za-z]) (?=\d)", "", text
    )


def _split(text: str, separators: Sequence[str]) -> list[str]:
    """Split outside of all brackets; the whole text if its brackets do not match."""
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        if token[0] in _OPEN or token[0].startswith(r"\begin{"):
            depth += 1
        elif token[0] in _CLOSE or token[0].startswith(r"\end{"):
            depth -= 1
        elif depth == 0 and token[0] in separators:
            parts.append(text[start : token.start()])
            start = token.end()
        if depth < 0:
            return [text.strip()]
    return [part.strip() for part in (*parts, text[start:])] if depth == 0 else [text.strip()]


def read_structure(text: str, depth: int = 0) -> Structure:
    """Read an answer that is clean."""
    text = text.strip()
    if depth > DEEPEST:
        return Structure("leaf", text)
    items = [item for item in _split(text, (",", ";")) if item]
    if len(items) > 1:
        read = [read_structure(item, depth + 1) for item in items]
        return Structure("list", text, tuple(part for one in read for part in _listed(one)))
    if text.count(r"\pm") == 1:  # with each \mp below its \pm
        return Structure(
            "list", text, tuple(read_structure(one, depth + 1) for one in _both_signs(text))
        )
    if r"\approx" in text and len(approximate := _split(text, (r"\approx",))) > 1:
        return read_structure(approximate[0] or approximate[1], depth + 1)  # the exact value counts
    if named := _read_named(text, depth):
        return named
    if (interval := _read_inequality(text)) is not None:
        return interval
    if len(parts := _split(text, (r"\cup",))) > 1 and all(parts):
        return Structure("union", text, tuple(read_structure(part, depth + 1) for part in parts))
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in matrix[2].strip().removesuffix(r"\\").split(r"\\")]
        if matrix[1] != "vmatrix" and len({len(row) for row in rows}) == 1:
            parts_of = tuple(read_structure(one, depth + 1) for row in rows for one in row)
            return Structure(f"matrix {len(rows)}x{len(rows[0])}", text, parts_of)
    return _read_bracketed(text, depth) or Structure("leaf", text)


def _listed(answer: Structure) -> tuple[Structure, ...]:
    return answer.parts if answer.kind == "list" else (answer,)


def _both_signs(text: str) -> tuple[str, str]:
    upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
    lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
    return re.sub(r"(^|[(=,])\s*\+\s*", r"\1", upper), lower


def _read_named(text: str, depth: int) -> Structure | None:
    r"""Read `x = 3`, `f(x) = 2x = x + x`, `1 + 1 = 2` or `x \in (0, 1)`; None for other texts."""
    first, *others = _split(text, ("=",))
    if not others:
        first, *others = _split(text, (r"\in",))
        if len(others) != 1 or not others[0] or not _VARIABLE.fullmatch(dense(first)):
            return None
    if not all((first, *others)):
        return None
    name = dense(first)
    if _NAME.fullmatch(name):
        values = [read_structure(other, depth + 1) for other in others]
        value = values[0] if len(values) == 1 else Structure("chain", text, tuple(values))
        if value.kind == "list":
            named = tuple(Structure(v.kind, v.text, v.parts, name) for v in value.parts)
            return Structure("list", text, named)
        return Structure(value.kind, value.text, value.parts, name)
    if re.search("[A-Za-z]", COMMAND.sub("", text)):
        return None  # an equation
    return Structure(
        "chain", text, tuple(read_structure(one, depth + 1) for one in (first, *others))
    )


def _read_inequality(text: str) -> Structure | None:
    r"""Read `x > 3` or `0 < x \leq 1` as the interval of x; None for other texts."""
    signs = re.findall(r"<|>|\\leq|\\geq", text)
    parts = _split(text, ("<", ">", r"\leq", r"\geq"))
    if len(signs) not in (1, 2) or len(parts) != len(signs) + 1 or not all(parts):
        return None
    if signs[0] in (">", r"\geq"):
        parts, signs = parts[::-1], signs[::-1]
        signs = [{">": "<", r"\geq": r"\leq"}.get(sign, ">") for sign in signs]
    if any(sign not in ("<", r"\leq") for sign in signs):
        return None
    if len(parts) == 2:
        if _VARIABLE.fullmatch(dense(parts[0])):
            parts, signs = [r"-\infty", *parts], ["<", *signs]
        else:
            parts, signs = [*parts, r"\infty"], [*signs, "<"]
    low, name, high = parts
    if not _VARIABLE.fullmatch(dense(name)):
        return None
    kind = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    return Structure(kind, text, (Structure("leaf", low), Structure("leaf", high)), dense(name))


def _read_bracketed(text: str, depth: int) -> Structure | None:
    r"""Read `(1, 2)`, `[0, 1)` or `\{1, 2\}`; one thing in round or curly brackets is itself."""
    tokens = [token[0] for token in _TOKEN.finditer(text)]
    if len(tokens) < 3 or tokens[0] not in _OPEN or tokens[-1] not in _CLOSE:
        return None
    level = 0
    for i, token in enumerate(tokens):
        level += (token in _OPEN) - (token in _CLOSE)
        if level == 0 and i < len(tokens) - 1:
            return None  # (a)(b)
    kind = tokens[0] + tokens[-1]
    inside = text[len(tokens[0]) : -len(tokens[-1])]
    parts = _split(inside, (",", ";"))
    if not all(parts):
        return None
    if kind in ("()", "{}") and len(parts) == 1:
        return read_structure(inside, depth + 1)
    if kind == r"\{\}":
        read = (read_structure(part, depth + 1) for part in parts)
        return Structure("set", text, tuple(part for one in read for part in _listed(one)))
    if kind in ("()", "[]", "[)", "(]"):
        return Structure(kind, text, tuple(read_structure(part, depth + 1) for part in parts))
    return None
