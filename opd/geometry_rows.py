"""geometry.csv: the spectrum of each matrix's update, as callbacks.UpdateGeometry measures it.

Apart from what measures, which needs torch and so seconds to import.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from opd.errors import UserError

FILE = "geometry.csv"


@dataclass(frozen=True)
class MatrixRow:
    """The update W_t - W_0 of one matrix; numbers as in :class:`opd.geometry.Spectrum`.

    Attributes:
        step: t.
        name: Of the parameter; with ``[e]`` behind it, of an expert's matrix in it.
        norm: Frobenius norm.
        spectral_norm: s_1.
        spectral_ratio: s_1 / Frobenius norm.
        effective_rank: exp of the entropy of s_i / sum s.
        top_ratio: How much of the norm the largest hundredth of the singular values has.
    """

    step: int
    name: str
    norm: float
    spectral_norm: float
    spectral_ratio: float
    effective_rank: float
    top_ratio: float


COLUMNS = [field.name for field in dataclasses.fields(MatrixRow)]


def parameter_of(matrix: str) -> str:
    """Return the name of the parameter that a matrix is of: of that of an expert, ``name[e]``."""
    return matrix.partition("[")[0]


def write_rows(path: Path, rows: Iterable[MatrixRow]) -> None:
    """Write the file, in one go, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".csv.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            step, name, *numbers = dataclasses.astuple(row)
            writer.writerow([step, name, *(f"{number:.8g}" for number in numbers)])
    os.replace(temporary, path)


def read_rows(path: Path) -> list[MatrixRow]:
    """Read the file.

    Raises:
        UserError: It is not a geometry.csv, or damaged; says in which line.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a geometry.csv ({error})") from error
    if header != COLUMNS:
        raise UserError(f"{path} line 1: not a geometry.csv: expected {','.join(COLUMNS)}")
    rows = []
    for i, cells in enumerate(lines, 2):
        try:
            step, name, *numbers = cells
            rows.append(MatrixRow(int(step), name, *map(float, numbers)))
        except (ValueError, TypeError) as error:
            expected = f"a step, a name and {len(COLUMNS) - 2} numbers"
            raise UserError(f"{path} line {i}: damaged: expected {expected}") from error
    return rows
