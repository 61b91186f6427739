"""Extract the answer of a completion and compare it with the reference."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from opd.errors import UserError

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last complete ``\boxed{...}``, braces balanced, or None."""
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start:i].strip()
    return None


def extract_last_number(text: str) -> str | None:
    """Return the last number of a text, such as -3, 1,024, 0.5 or 3/4; None without one."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def extract_pattern(text: str, pattern: str) -> str | None:
    """Return the first group of a pattern's last match; None without one."""
    found = list(re.finditer(pattern, text))
    return found[-1].group(1).strip() if found else None


def _as_number(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _normalise(text: str) -> str:
    return re.sub(r"\s+", "", text.strip().strip("$").rstrip("."))


def same_number_or_text(answer: str, reference: str) -> bool:
    """Whether two answers are the same number, or the same text but for white space and ``$``."""
    left, right = _normalise(answer), _normalise(reference)
    if left == right:
        return True
    a, b = _as_number(left), _as_number(right)
    return a is not None and a == b


def same_mathematics(answer: str, reference: str) -> bool:
    """Whether two LaTeX answers are equivalent, by the library math_verify."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${reference}$"), parse(f"${answer}$")))


@dataclass(frozen=True)
class AnswerVerifier:
    r"""Decides whether a completion is right.

    Args:
        format: Where the answer stands: boxed (the last \boxed{}), last_number, or a regular
            expression with one group, of which the last match counts.
        equivalence: number (same number or same text), or math (LaTeX, needs math_verify).
    """

    format: str = "boxed"
    equivalence: Literal["number", "math"] = "number"

    def __post_init__(self) -> None:
        if self.format in ("boxed", "last_number"):
            return
        try:
            groups = re.compile(self.format).groups
        except re.error as error:
            raise UserError(
                f"answer format {self.format!r} is no regular expression: {error}"
            ) from error
        if groups != 1:
            raise UserError(
                f"answer format {self.format!r} must be boxed, last_number, or a regular "
                f"expression with exactly one group (it has {groups})"
            )

    def extract(self, completion: str) -> str | None:
        """Return the completion's answer, None if it gives none."""
        if self.format == "boxed":
            return extract_boxed(completion)
        if self.format == "last_number":
            return extract_last_number(completion)
        return extract_pattern(completion, self.format)

    def __call__(self, completion: str, reference: str) -> bool:
        """Whether the completion's answer equals the reference."""
        answer = self.extract(completion)
        if answer is None:
            return False
        if same_number_or_text(answer, reference):
            return True
        return self.equivalence == "math" and same_mathematics(answer, reference)
