r"""Extract the answer of a completion and compare it with the reference.

A completion is anything that a model can write, so nothing here may take long over it: braces are
matched in one pass, numbers are compared digit by digit, and what others' code does (a user's
regular expression, math_verify) has a time limit. What cannot be checked in time is wrong.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import regex  # as re, but with a time limit; it also holds outside of the main thread

from opd.errors import UserError

log = logging.getLogger(__name__)

SECONDS = 1.0  # that one check of others' code may take; the usual one takes a thousandth of it
LONGEST_RATIO = 200  # digits that are calculated with; longer fractions are compared as text
LONGEST_MATHEMATICS = 1000  # characters that math_verify is given

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # a comma separates groups of three, or numbers
_SIGN = r"(?:(?<![\d)])[-+])?"  # after a number or a bracket it is an operator
_NUMBER = re.compile(rf"{_SIGN}{_DIGITS}(?:\.\d+)?(?:/\d+)?")
_DECIMAL = re.compile(r"([-+]?)(\d*)(?:\.(\d*))?(?:[eE]([-+]?\d{1,18}))?", re.ASCII)
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:/\d+)?", re.ASCII)
_BRACES = re.compile(r"\\boxed\s*\{|[{}]")


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last complete ``\boxed{...}``, braces balanced, or None."""
    opened: list[tuple[int, bool]] = []  # where the content of an open brace starts, and if boxed
    start, end = -1, -1
    for brace in _BRACES.finditer(text):
        if brace[0] != "}":
            opened.append((brace.end(), len(brace[0]) > 1))
        elif opened:
            begin, boxed = opened.pop()
            if boxed and begin > start:
                start, end = begin, brace.start()
    return text[start:end].strip() if start >= 0 else None


def extract_last_number(text: str) -> str | None:
    """Return the last number of a text, such as -3, 1,024, 0.5 or 3/4; None without one."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def extract_pattern(text: str, pattern: str) -> str | None:
    """Return the first group of a pattern's last match; None without one, or not in time."""
    try:
        found = list(_compiled(pattern).finditer(text, timeout=SECONDS))
    except TimeoutError:
        _warn_once("model.verifier.format", pattern)
        return None
    answer = found[-1].group(1) if found else None
    return None if answer is None else answer.strip()


@functools.cache
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


@functools.cache
def _warn_once(what: str, example: str) -> None:
    """Say that a check took too long, once for each kind of check."""
    log.warning(
        "%s %s: a check takes more than %g s; such answers count as wrong", what, example, SECONDS
    )


def _normalise(text: str) -> str:
    return re.sub(r"\s+", "", text).lstrip("$").rstrip("$.")


def _as_decimal(text: str) -> tuple[str, str, int] | None:
    """Bring a decimal into the one form (sign, digits, e) of sign 0.digits 10^e; no arithmetic."""
    match = _DECIMAL.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None
    whole, fraction = match[2], match[3] or ""
    digits = (whole + fraction).lstrip("0")
    shift = len(digits) - len(fraction)
    if not digits:
        return "", "", 0
    return match[1].replace("+", ""), digits.rstrip("0"), shift + int(match[4] or 0)


def _as_ratio(text: str) -> Fraction | None:
    """Read a fraction or a decimal that is short enough to calculate with."""
    numerator, slash, denominator = text.partition("/")
    if len(text) > LONGEST_RATIO or (slash and not denominator.isdigit()):
        return None
    decimal = _as_decimal(numerator)
    if decimal is None or abs(decimal[2]) > LONGEST_RATIO:
        return None
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def same_number_or_text(answer: str, reference: str) -> bool:
    """Whether two answers are the same number, or the same text but for white space and ``$``."""
    left, right = _normalise(answer), _normalise(reference)
    if left == right:
        return True
    left, right = (t.replace(",", "") if _GROUPED.fullmatch(t) else t for t in (left, right))
    if "/" not in left + right:
        a = _as_decimal(left)
        return a is not None and a == _as_decimal(right)
    ratio = _as_ratio(left)
    return ratio is not None and ratio == _as_ratio(right)


def same_mathematics(answer: str, reference: str) -> bool:
    """Whether two LaTeX answers are equivalent, by math_verify in a process that can be stopped.

    An answer that is too long, or takes too long, is not.
    """
    from opd.mathematics import equivalent

    if len(answer) > LONGEST_MATHEMATICS or len(reference) > LONGEST_MATHEMATICS:
        return False
    verdict = equivalent(answer, reference, SECONDS)
    if verdict is None:
        _warn_once("model.verifier.equivalence", "math")
    return bool(verdict)


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
        if self.equivalence == "math" and importlib.util.find_spec("math_verify") is None:
            raise UserError("answer equivalence math needs math_verify: pip install 'opd[math]'")
        if self.format in ("boxed", "last_number"):
            return
        try:
            groups = _compiled(self.format).groups
        except regex.error as error:
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
