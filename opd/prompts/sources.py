"""Where prompts come from: a hub data set, a JSONL or parquet file, or ``embedded:NAME``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.embedded import arithmetic
from opd.errors import UserError

Row = Mapping[str, Any]


def read_rows(source: str, split: str) -> tuple[list[Row], str]:
    """Read all rows of a prompt source.

    Args:
        source: ``embedded:train``, ``embedded:test``, a .jsonl or .parquet file, or a hub id.
        split: Split of a hub data set; ignored elsewhere.

    Returns:
        The rows, and what one row is called in messages (``line`` or ``row``).

    Raises:
        UserError: The source does not exist, cannot be parsed, or holds no rows.
    """
    name = source.removeprefix("embedded:")
    unit = "row"
    if source != name:
        if name not in arithmetic.PROMPTS:
            known = ", ".join(f"embedded:{known}" for known in arithmetic.PROMPTS)
            raise UserError(f"{source}: the embedded prompts are {known}")
        rows: list[Row] = list(arithmetic.rows(name))
    elif source.endswith((".jsonl", ".json")):
        rows, unit = _read_jsonl(Path(source).expanduser()), "line"
    elif source.endswith(".parquet"):
        rows = _read_parquet(Path(source).expanduser())
    else:
        rows = _read_hub(source, split)
    if not rows:
        raise UserError(f"{source}: holds no prompts")
    return rows, unit


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        if not line.strip():
            if not text.strip():
                break
            raise UserError(f"{path} line {number}: is empty; remove it")
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number}: expected a JSON object, got {line[:60]!r}")
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise UserError(f"{path}: cannot be read as parquet ({error})") from error


def _read_hub(source: str, split: str) -> list[Row]:
    import datasets

    if source.startswith((".", "/", "~")) or Path(source).exists():
        raise UserError(f"{source}: prompts come from a .jsonl or .parquet file or a hub id")
    try:
        return list(datasets.load_dataset(source, split=split))
    except Exception as error:  # the hub client raises dozens of unrelated types
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{source}: neither a .jsonl or .parquet file nor a data set on the hub with "
            f"split {split!r} ({type(error).__name__}: {reason})"
        ) from error
