"""Which rows of a source count: those whose fields have the values that ``data.where`` names."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd.errors import UserError
from opd.prompts.format import value_of
from opd.prompts.sources import Row, columns

MANY = 5  # values that a message lists
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON = re.compile(r"(>=|<=|>|<)\s*([-+]?\d+(?:\.\d+)?)")


def check_where(where: Mapping[str, Any] | None) -> None:
    """Refuse what no value of a field can be.

    Raises:
        UserError: A value is not text, a number, true or false, or a list of these.
    """
    for field, wanted in (where or {}).items():
        if not all(isinstance(one, str | int | float) for one in _several(wanted)):
            raise UserError(
                f"data.where.{field}={wanted}: must be text, a number, true or false, a list of "
                "these, or a comparison such as '>= 6'"
            )


def matching(rows: Sequence[Row], where: Mapping[str, Any], source: str) -> list[int]:
    """Return the numbers of the rows that have all these values.

    Raises:
        UserError: None has; the message says which field is to blame.
    """
    conditions = {field: list(map(_condition, _several(w))) for field, w in where.items()}
    numbers: list[int] = []
    seen: dict[str, dict[str, None]] = {field: {} for field in where}  # sets that keep their order
    for number, row in enumerate(columns(rows, where)):
        values = {field: value_of(row, field) for field in where}
        if all(any(is_met(values[f]) for is_met in met) for f, met in conditions.items()):
            numbers.append(number)
        if not numbers:
            for field, value in values.items():
                if value is not None and len(seen[field]) < MANY:
                    seen[field].setdefault(repr(value)[:40])
    if numbers:
        return numbers
    for field, found in seen.items():
        if not found:
            names = sorted({name for row in rows for name in row})
            raise UserError(f"data.where: no row of {source} has {field!r}; rows have {names}")
    there_are = "; ".join(f"{field} is {', '.join(found)}, ..." for field, found in seen.items())
    raise UserError(f"data.where: no row of {source} has all of {dict(where)}; {there_are}")


def _several(wanted: Any) -> list[Any]:
    return wanted if isinstance(wanted, list) else [wanted]


def _condition(wanted: str | float) -> Callable[[Any], bool]:
    comparison = _COMPARISON.fullmatch(wanted.strip()) if isinstance(wanted, str) else None
    if comparison is None:  # and 1 is not true
        return lambda value: value == wanted and isinstance(value, bool) == isinstance(wanted, bool)
    compare, limit = COMPARISONS[comparison[1]], float(comparison[2])
    return lambda value: _is_number(value) and compare(value, limit)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
