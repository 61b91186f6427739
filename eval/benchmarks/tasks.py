"""What the YAML files of ``tasks/`` name: the problems of a benchmark, and the scores of one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from eval.benchmarks.formats import FORMATS
from eval.benchmarks.problem import Doc, LeftOut, Record
from eval.benchmarks.rows import data_folder, load_rows
from eval.benchmarks.scoring import SCORERS, verdict_of
from eval.benchmarks.table import Benchmark, read_benchmark
from eval.statistics import sample_metrics
from opd.equality import same_number_or_text
from opd.errors import UserError
from opd.prompts.sources import Row

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problems:
    """The problems of a benchmark, and how many rows are none, by reason."""

    docs: list[Doc]
    left_out: Mapping[str, int]


def load_problems(benchmark: Benchmark, data: Path | None = None) -> Problems:
    """Read a benchmark and make problems of its rows.

    Args:
        benchmark: Which.
        data: Folder with copies. None: the hub.

    Raises:
        UserError: It cannot be read, or is not what the table says: another number of rows or
            problems, a field that is missing or empty, an id that comes twice, another first gold.
    """
    docs: dict[str, Doc] = {}
    left_out = Counter[str]()
    for number, row in enumerate(load_rows(benchmark, data), start=1):
        where = f"{benchmark.task}: row {number} of {benchmark.source}"
        record = _record(benchmark, row, where)
        try:
            made = FORMATS[benchmark.format].convert(record, benchmark)
        except LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{where} cannot be read as {benchmark.format} ({type(error).__name__}); take "
                f"{benchmark.where}"
            ) from error
        identity = str(record["id"]) if "id" in record else str(number - 1)
        if identity in docs:
            raise UserError(f"{where} has the id {identity!r} of an earlier one; keep one")
        docs[identity] = {"id": identity, "scorer": benchmark.scorer, **made}
    _check(benchmark, list(docs.values()), left_out)
    return Problems(list(docs.values()), dict(left_out))


def _record(benchmark: Benchmark, row: Row, where: str) -> Record:
    """Take the fields of a row that the benchmark names."""
    record: dict[str, Any] = {}
    for name, field in benchmark.fields.items():
        values = [row[part] for part in ([field] if isinstance(field, str) else field)]
        empty = any(value is None or value in ("", []) for value in values)
        if empty and name not in FORMATS[benchmark.format].may_be_empty:
            raise UserError(f"{where}: its field {field!r} is empty; take {benchmark.where}")
        record[name] = values[0] if isinstance(field, str) else values
    return record


def _check(benchmark: Benchmark, docs: Sequence[Doc], left_out: Mapping[str, int]) -> None:
    if benchmark.problems is not None and len(docs) != benchmark.problems:
        raise UserError(
            f"{benchmark.task}: {len(docs)} problems are left of {benchmark.rows} rows, and there "
            f"should be {benchmark.problems}; take {benchmark.where}"
        )
    if not docs:
        raise UserError(f"{benchmark.task}: none of {benchmark.rows} rows is a problem")
    first = benchmark.first
    if first is not None and not same_number_or_text(str(docs[0]["reference"]), first):
        raise UserError(
            f"{benchmark.task}: the first answer is not {first}: these are other problems, or they "
            f"come in another order; take {benchmark.where}"
        )
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        level = logging.WARNING if benchmark.problems is None else logging.INFO
        count = sum(left_out.values())
        log.log(
            level, "%s: %d of %d rows left out: %s", benchmark.task, count, benchmark.rows, reasons
        )


def dataset(config_source: str = "inline", **_: Any) -> dict[str, Any]:
    """Return a benchmark's problems by its split; lm-eval calls it, and says which YAML it read.

    Raises:
        UserError: See :func:`load_problems`.
    """
    from datasets import Dataset, Features, Value

    if not Path(config_source).is_file():
        raise UserError("a benchmark is a YAML file; one that is made in memory cannot be loaded")
    benchmark = read_benchmark(Path(config_source))
    docs = load_problems(benchmark, data_folder()).docs
    # Tests may have more than the 2 GiB that a column of type string holds.
    kinds = {name: Value("large_string" if name == "tests" else "string") for name in docs[0]}
    return {benchmark.split: Dataset.from_list(docs, features=Features(kinds))}


def process_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Return the metrics of one problem; lm-eval takes their means over problems.

    Args:
        doc: The problem.
        results: Its completions, in a list of one entry. Those that carry a verdict keep it.

    Raises:
        UserError: A program would have to be run, and nothing may run it.
    """
    completions = [results[0]] if isinstance(results[0], str) else list(results[0])
    scorer = SCORERS[doc["scorer"]]
    verdicts = [verdict_of(completion) or scorer(completion, doc) for completion in completions]
    return sample_metrics(
        right=[verdict.right for verdict in verdicts],
        groups=scorer.group([verdict.answer for verdict in verdicts]),
        lengths=_known([getattr(completion, "tokens", None) for completion in completions]),
        truncated=_known([getattr(completion, "truncated", None) for completion in completions]),
        answered=[verdict.answer is not None for verdict in verdicts],
    )


def _known(values: Sequence[T | None]) -> list[T] | None:
    """Return values if all of them are known, as those of another model than ours are not."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None
