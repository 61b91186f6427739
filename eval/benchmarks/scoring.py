"""Whether a completion is right, what it answers, and which answers of a problem are the same."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eval.benchmarks.code import extract_code, plain_tests, with_prefix
from eval.benchmarks.formats import LETTERS
from eval.benchmarks.table import Benchmark
from opd.answers import AnswerVerifier, extract_boxed, same_mathematics, same_number_or_text
from opd.errors import UserError

# Runs a program on tests (see ``eval.benchmarks.code.json_tests``) and says if it passes all.
Sandbox = Callable[[str, str], bool]

_STYLE = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|boldsymbol)\s*\{([^{}]*)\}")
_LETTER = re.compile(rf"\(\s*([{LETTERS}])\s*\)\.?|([{LETTERS}])[.)]?")


@dataclass(frozen=True)
class Verdict:
    """Whether a completion is right, and the answer that it gives; None: it gives none."""

    right: bool
    answer: str | None


class Completion(str):
    """A completion that knows more than its text; lm-eval hands it on as the text that it is.

    Args:
        text: What the model wrote.
        tokens: Its length in tokens.
        truncated: Whether it was cut at the longest length.
        verdict: Its score, where that was made before.
    """

    tokens: int | None
    truncated: bool | None
    verdict: Verdict | None

    def __new__(
        cls,
        text: str,
        tokens: int | None = None,
        truncated: bool | None = None,
        verdict: Verdict | None = None,
    ) -> Completion:
        self = super().__new__(cls, text)
        self.tokens, self.truncated, self.verdict = tokens, truncated, verdict
        return self


def verdict_of(completion: str) -> Verdict | None:
    """Return the verdict that a completion carries, if it does."""
    return completion.verdict if isinstance(completion, Completion) else None


class Scorer(Protocol):
    """Scores the completions of a problem."""

    def __call__(self, completion: str, doc: Mapping[str, Any]) -> Verdict:
        """Score one completion."""

    def group(self, answers: Sequence[str | None]) -> list[int | None] | None:
        """Number the answers of a problem so that equal ones have the same number.

        Numbers count up from 0 in the order of first appearance; no answer has none. None: there is
        nothing that a majority could agree on.
        """


class MathScorer:
    r"""The last \boxed{} against the gold: the same mathematics, or within the tolerance."""

    def __call__(self, completion: str, doc: Mapping[str, Any]) -> Verdict:
        answer = extract_boxed(completion)
        if answer is None:
            return Verdict(False, None)
        return Verdict(self._right(answer, doc), answer)

    def _right(self, answer: str, doc: Mapping[str, Any]) -> bool:
        reference, unit, tolerance = doc["reference"], doc.get("unit"), doc.get("tolerance")
        answers = [answer]
        if unit and (bare := without_unit(answer, unit)) != answer:
            answers.append(bare)
        return any(
            equal(given, reference) or bool(tolerance and within(given, reference, tolerance))
            for given in answers
        )

    def group(self, answers: Sequence[str | None]) -> list[int | None]:
        return _grouped(answers, equal)


def equal(answer: str, reference: str) -> bool:
    """Whether two expressions are the same mathematics."""
    if same_number_or_text(answer, reference):
        return True
    _needs_math_verify()
    return same_mathematics(answer, reference)


@functools.cache
def _needs_math_verify() -> None:
    AnswerVerifier(equivalence="math")  # or it says what to install


def without_unit(answer: str, unit: str) -> str:
    """Return an answer without its unit, if it ends with it."""
    bare = _STYLE.sub(r"\1", answer).strip().strip("$").strip()
    plain = _STYLE.sub(r"\1", unit).strip().strip("$").strip()
    if plain and bare.endswith(plain):
        return bare.removesuffix(plain).rstrip(" \\,~").strip()
    return answer


def within(answer: str, reference: str, tolerance: str) -> bool:
    """Whether numbers, of which there may be several, differ by no more than their tolerances.

    A tolerance may hold for all, or each has its own, of which some may be left empty.
    """
    given, wanted = _numbers(answer), _numbers(reference)
    allowed = _numbers(",".join(part.strip() or "0" for part in tolerance.split(",")))
    if not given or not wanted or not allowed or len(given) != len(wanted):
        return False
    if len(allowed) == 1:
        allowed *= len(wanted)
    return len(allowed) == len(wanted) and all(
        abs(a - b) <= c for a, b, c in zip(given, wanted, allowed, strict=True)
    )


def _numbers(text: str) -> list[float] | None:
    try:
        return [float(part.strip(" $")) for part in text.split(",")]
    except ValueError:
        return None


class ChoiceScorer:
    r"""A letter in the last \boxed{}, or as all that a completion says: C, (C), C., \text{C}."""

    def __call__(self, completion: str, doc: Mapping[str, Any]) -> Verdict:
        boxed = extract_boxed(completion)
        answer = letter(completion if boxed is None else boxed)
        return Verdict(answer is not None and answer == doc["reference"], answer)

    def group(self, answers: Sequence[str | None]) -> list[int | None]:
        return _grouped(answers, str.__eq__)


def letter(text: str) -> str | None:
    """Return the letter that a text is, however it is written; None if it is more than a letter."""
    bare = text.strip().strip("$").strip()
    while (inner := _STYLE.fullmatch(bare)) is not None:
        bare = inner[1].strip()
    found = _LETTER.fullmatch(_STYLE.sub(r"\1", bare))
    return found and (found[1] or found[2])


class PatternScorer:
    """What a regular expression of the problem finds last, against the gold: number or text."""

    def __call__(self, completion: str, doc: Mapping[str, Any]) -> Verdict:
        verifier = AnswerVerifier(doc["pattern"])
        answer = verifier.extract(completion)
        right = answer is not None and same_number_or_text(answer, doc["reference"])
        return Verdict(right, answer)

    def group(self, answers: Sequence[str | None]) -> list[int | None]:
        return _grouped(answers, same_number_or_text)


class CodeScorer:
    """The last fenced block, run on the problem's tests.

    Args:
        sandbox: Runs it. None: nothing may, and only a completion without a program can be scored.
    """

    def __init__(self, sandbox: Sandbox | None = None) -> None:
        self.sandbox = sandbox

    def __call__(self, completion: str, doc: Mapping[str, Any]) -> Verdict:
        code = extract_code(completion)
        if code is None:
            return Verdict(False, None)
        if self.sandbox is None:
            raise UserError(
                "to score a benchmark of code means to run what a model wrote, and nothing was "
                "allowed to; opd evaluate runs it in a sandbox"
            )
        try:
            tests = _plain_tests(doc["tests"])
        except ValueError as error:
            raise UserError(f"problem {doc['id']}: {error}") from error
        return Verdict(self.sandbox(with_prefix(doc["prefix"], code), tests), code)

    def group(self, answers: Sequence[str | None]) -> None:
        """Programs that do the same cannot be told: there is no majority."""


@functools.lru_cache(maxsize=1)
def _plain_tests(tests: str) -> str:
    return plain_tests(tests)  # of one problem, for all its completions


SCORERS: dict[str, Scorer] = {
    "math": MathScorer(),
    "choice": ChoiceScorer(),
    "pattern": PatternScorer(),
    "code": CodeScorer(),
}


def scorer_of(benchmark: Benchmark, sandbox: Sandbox | None = None) -> Scorer:
    """Return the scorer of a benchmark.

    Args:
        benchmark: Which.
        sandbox: What runs programs, for benchmarks of code.
    """
    return CodeScorer(sandbox) if benchmark.scorer == "code" else SCORERS[benchmark.scorer]


def _grouped(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> list[int | None]:
    firsts: list[str] = []
    numbers: dict[str, int] = {}
    for answer in answers:
        if answer is None or answer in numbers:
            continue
        known = (i for i, first in enumerate(firsts) if same(answer, first))
        numbers[answer] = next(known, len(firsts))
        if numbers[answer] == len(firsts):
            firsts.append(answer)
    return [None if answer is None else numbers[answer] for answer in answers]
