r"""Extract the answer of a completion and compare it with the reference.

A completion is anything that a model can write, so nothing here may take long over it: braces are
matched in one pass, numbers are compared digit by digit, and what others' code does (a user's
regular expression, math_verify) has a time limit. What cannot be checked in time is wrong.
"""

from __future__ import annotations

import functools
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import regex  # as re, but with a time limit; it also holds outside of the main thread

from opd.equality import same_mathematics, same_number_or_text
from opd.errors import UserError
from opd.golds import LONGEST, clean_reference

log = logging.getLogger(__name__)

SECONDS = 1.0  # that one check of others' code may take; the usual one takes a thousandth of it

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # a comma separates groups of three, or numbers
_SIGN = r"(?:(?<![\d)])[-+])?"  # after a number or a bracket it is an operator
_NUMBER = re.compile(rf"{_SIGN}{_DIGITS}(?:\.\d+)?(?:/\d+)?")
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


class Verifier(ABC):
    """Decides whether completions are right, by what their prompts have as answers."""

    def check(self, references: Sequence[str]) -> None:  # noqa: B027 - any text may be an answer
        """Called before a run, with the answers of all its prompts.

        Raises:
            UserError: It can do nothing with them.
        """

    @abstractmethod
    def __call__(self, completion: str, reference: str) -> bool:
        """Whether the completion is right."""

    def verify(self, completions: Sequence[str], references: Sequence[str]) -> list[bool]:
        """Decide about several completions, each with the answer of its prompt."""
        return [self(c, r) for c, r in zip(completions, references, strict=True)]


@dataclass(frozen=True)
class AnswerVerifier(Verifier):
    r"""Decides whether a completion is right.

    Args:
        format: Where the answer stands: boxed (the last \boxed{}), last_number, or a regular
            expression with one group, of which the last match counts.
        equivalence: number (same number or same text), or math (`opd/equality.py`; math_verify's
            parser reads the LaTeX).
    """

    format: str = "boxed"
    equivalence: Literal["number", "math"] = "number"

    def __post_init__(self) -> None:
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

    def __call__(
        self,
        completion: str,
        reference: str,
        *,
        tolerance: str | float | None = None,
        unit: str | None = None,
    ) -> bool:
        """Whether the completion's answer equals the reference; see `same`."""
        answer = self.extract(completion)
        return answer is not None and self.same(answer, reference, tolerance=tolerance, unit=unit)

    def same(
        self,
        answer: str,
        reference: str,
        *,
        tolerance: str | float | None = None,
        unit: str | None = None,
    ) -> bool:
        """Whether two answers are equal; an empty one equals nothing.

        Args:
            answer: What `extract` has returned.
            reference: The right answer, or another completion's.
            tolerance: Largest absolute difference of numbers; several, separated by commas, are
                those of the reference's answers in their order. Only for equivalence math.
            unit: The reference's unit, which an answer may leave out. Only for equivalence math.

        Raises:
            UserError: A tolerance that is no number or does not fit, or with equivalence number.
        """
        if not answer.strip() or not reference.strip():
            return False
        if self.equivalence == "number":
            if tolerance or unit:
                raise UserError("a tolerance or a unit needs a verifier with equivalence: math")
            return same_number_or_text(answer, reference)
        if max(len(answer), len(reference)) > LONGEST:
            return same_number_or_text(answer, reference)
        verdict = same_mathematics(answer, reference, tolerance, unit, SECONDS)
        if verdict is None:
            _warn_once("model.verifier.equivalence", "math")
        return bool(verdict)


def group_answers(answers: Sequence[str | None], verifier: AnswerVerifier) -> list[int | None]:
    """Return the group of each answer, by equality to the group's first answer.

    Groups are numbered from 0 in the order in which they are seen. An answer that is missing
    belongs to none: its group is None. Each distinct text is compared once with each group.
    """
    groups: dict[str, int] = {}  # by text, as it is compared
    firsts: list[str] = []  # the first answer of each group
    found: list[int | None] = []
    for answer in answers:
        if answer is None:
            found.append(None)
            continue
        text = clean_reference(answer) if verifier.equivalence == "math" else answer.strip()
        if text not in groups:
            equal = (i for i, first in enumerate(firsts) if verifier.same(answer, first))
            groups[text] = next(equal, len(firsts))
            if groups[text] == len(firsts):
                firsts.append(answer)
        found.append(groups[text])
    return found
