"""Data and verdicts of the lm-eval task ``arithmetic``."""

from typing import Any

from datasets import Dataset

from opd.answers import AnswerVerifier
from opd.embedded.arithmetic import ANSWER_PATTERN, rows

VERIFIER = AnswerVerifier(ANSWER_PATTERN)


def load(**kwargs: Any) -> dict[str, Dataset]:
    """Return the test problems; nothing is downloaded."""
    return {"test": Dataset.from_list(rows("test"))}


def process_results(doc: dict[str, str], results: list[list[str]]) -> dict[str, float]:
    """Average over the completions of one problem (avg@k)."""
    completions = results[0]
    right = [VERIFIER(completion, doc["answer"]) for completion in completions]
    return {"accuracy": sum(right) / len(right)}
