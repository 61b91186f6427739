"""Formats of data sets: how a row becomes a problem. Those of code are in ``eval.benchmarks.code``.

A problem (``Doc``) has the same fields whatever its data set: ``id``, ``scorer``, ``prompt`` (what
the user says), ``reference`` (the gold, as the data set writes it), and for some scorers
``pattern``, ``tolerance``, ``unit`` or ``tests``.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eval.benchmarks import code
from eval.benchmarks.problem import Doc, Record, render
from opd.golds import clean_reference

if TYPE_CHECKING:
    from eval.benchmarks.table import Benchmark

LETTERS = "ABCD"


@dataclass(frozen=True)
class Format:
    """How a row becomes a problem.

    Args:
        convert: Makes a problem of a record; raises ``LeftOut`` where that cannot be one.
        needed: Our names of the fields that a benchmark of this format must have.
        optional: Those that it may have.
        may_be_empty: Those whose value may be missing in a row; the field itself may not.
    """

    convert: Callable[[Record, Benchmark], Doc]
    needed: frozenset[str]
    optional: frozenset[str] = frozenset({"id"})
    may_be_empty: frozenset[str] = frozenset()


def answer(record: Record, benchmark: Benchmark) -> Doc:
    """Make a problem with a gold that is text: a number, an expression, or several of them.

    Of a list of golds the first counts: in OlympiadBench the others are other ways to write it.
    """
    gold = record["answer"]
    reference = str(gold[0] if isinstance(gold, list) else gold)
    if benchmark.answer_after is not None:
        reference = reference.rpartition(benchmark.answer_after)[2]
    reference = reference.strip()
    if benchmark.scorer == "math":
        reference = clean_reference(reference)
    if not reference:
        raise ValueError("no gold")
    texts = [record.get("context"), record["problem"]]
    return {
        "prompt": render(benchmark.prompt, problem="\n".join(str(text) for text in texts if text)),
        "reference": reference,
        "pattern": benchmark.pattern,
        "tolerance": _text(record.get("tolerance")),
        "unit": _text(record.get("unit")),
    }


def _text(value: object) -> str | None:
    return str(value).strip() or None if value is not None else None


def choice(record: Record, benchmark: Benchmark) -> Doc:
    """Make a question with four options, in an order that follows from its id."""
    options = [str(option).strip() for option in [record["answer"], *record["wrong"]]]
    if len(options) != len(LETTERS):
        raise ValueError(f"{len(options)} options")
    order = order_of(str(record["id"]))
    lines = [f"{letter}) {options[i]}" for letter, i in zip(LETTERS, order, strict=True)]
    problem = str(record["problem"]).strip()
    return {
        "prompt": render(benchmark.prompt, problem=problem, options="\n".join(lines)),
        "reference": LETTERS[order.index(0)],
    }


def order_of(identity: str) -> tuple[int, ...]:
    """Return the order of four options: a fixed function of the id, all 24 about equally often."""
    digest = hashlib.sha256(identity.strip().encode()).digest()
    orders = list(itertools.permutations(range(len(LETTERS))))
    return orders[int.from_bytes(digest) % len(orders)]


FORMATS: Mapping[str, Format] = {
    "answer": Format(
        answer,
        frozenset({"problem", "answer"}),
        optional=frozenset({"id", "context", "tolerance", "unit"}),
        may_be_empty=frozenset({"context", "tolerance", "unit"}),
    ),
    "choice": Format(choice, frozenset({"id", "problem", "answer", "wrong"}), optional=frozenset()),
    "humaneval": Format(code.humaneval, frozenset({"id", "problem", "tests", "function"})),
    "mbpp": Format(
        code.mbpp,
        frozenset({"id", "problem", "examples", "tests", "imports"}),
        may_be_empty=frozenset({"imports"}),
    ),
    "livecodebench": Format(
        code.livecodebench,
        frozenset({"id", "problem", "starter", "date", "public", "private", "facts"}),
        may_be_empty=frozenset({"starter"}),
    ),
    "taco": Format(
        code.taco,
        frozenset({"problem", "starter", "tests"}),
        may_be_empty=frozenset({"problem", "starter", "tests"}),
    ),
    "codeforces": Format(
        code.codeforces,
        frozenset({"id", "title", "problem", "input", "output", "interaction", "note", "examples"})
        | {"seconds", "memory", "tests", "complete", "checker", "mode"},
        may_be_empty=frozenset(
            {"input", "output", "interaction", "note", "examples", "seconds", "memory"}
            | {"problem", "tests", "complete", "checker", "mode"}
        ),
    ),
}
