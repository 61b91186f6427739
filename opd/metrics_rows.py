"""Read metrics.csv: apart from what writes it, which needs Lightning and so seconds to import."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from opd.errors import UserError


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Read metrics.csv: one mapping per complete row, without its empty cells.

    A last line without its end is one that is being written, or whose writer was killed, and is
    left out.

    Raises:
        UserError: It is not a metrics.csv; says in which line.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a metrics.csv ({error})") from error
    reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    try:
        columns = next(reader, [])
        if columns and "step" not in columns:
            raise UserError(f"{path} line 1: not a metrics.csv: has no column 'step'")
        rows = []
        for cells in filter(None, reader):
            row = {name: cell for name, cell in zip(columns, cells, strict=False) if cell}
            if len(cells) > len(columns) or not row.get("step", "").isdecimal():
                expected = f"a step and {len(columns) - 1} more cells"
                raise UserError(f"{path} line {reader.line_num}: damaged: expected {expected}")
            if len(cells) == len(columns):
                rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not a metrics.csv ({error})") from error
    return rows
