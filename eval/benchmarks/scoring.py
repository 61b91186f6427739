"""Whether a completion is right, what it answers, and which answers of a problem are the same."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eval.benchmarks.code import read_tests
from eval.benchmarks.formats import LETTERS
from eval.benchmarks.table import Benchmark
from opd.answers import AnswerVerifier, extract_boxed, group_answers
from opd.errors import UserError
from opd.rewards import CodeTests, CodeVerifier, Sandbox, extract_code

_STYLE = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|boldsymbol)\s*\{([^{}]*)\}")
_LETTER = re.compile(rf"\(\s*([{LETTERS}])\s*\)\.?|([{LETTERS}])[.)]?")

MATHEMATICS = AnswerVerifier(equivalence="math")


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
        answer = MATHEMATICS.extract(completion)
        if answer is None:
            return Verdict(False, None)
        right = MATHEMATICS.same(
            answer,
            doc["reference"],
            tolerance=doc.get("tolerance") or None,
            unit=doc.get("unit") or None,
        )
        return Verdict(right, answer)

    def group(self, answers: Sequence[str | None]) -> list[int | None]:
        return group_answers(answers, MATHEMATICS)


class ChoiceScorer:
    r"""A letter in the last \boxed{}, or as all that a completion says: C, (C), C., \text{C}."""

    def __call__(self, completion: str, doc: Mapping[str, Any]) -> Verdict:
        boxed = extract_boxed(completion)
        answer = letter(completion if boxed is None else boxed)
        return Verdict(answer is not None and answer == doc["reference"], answer)

    def group(self, answers: Sequence[str | None]) -> list[int | None]:
        return group_answers(answers, AnswerVerifier())


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
        right = answer is not None and verifier.same(answer, doc["reference"])
        return Verdict(right, answer)

    def group(self, answers: Sequence[str | None]) -> list[int | None]:
        return group_answers(answers, AnswerVerifier())


class CodeScorer:
    """The last fenced block, run on the problem's tests.

    Args:
        sandbox: Where it runs. None: nothing may, and only a completion without a program can be
            scored.
    """

    def __init__(self, sandbox: Sandbox | None = None) -> None:
        self.verifier = None if sandbox is None else CodeVerifier(sandbox)

    def __call__(self, completion: str, doc: Mapping[str, Any]) -> Verdict:
        code = extract_code(completion)
        if code is None:
            return Verdict(False, None)
        if self.verifier is None:
            raise UserError(
                "to score a benchmark of code means to run what a model wrote, and nothing was "
                "allowed to; opd evaluate runs it in a sandbox"
            )
        try:
            tests = _tests(doc["tests"])
        except ValueError as error:
            raise UserError(f"problem {doc['id']}: {error}") from error
        return Verdict(self.verifier.judge(code, tests).passed, code)

    def group(self, answers: Sequence[str | None]) -> None:
        """Programs that do the same cannot be told: there is no majority."""


@functools.lru_cache(maxsize=8)
def _tests(tests: str) -> CodeTests:
    return read_tests(tests)  # of few problems, for all their completions


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
