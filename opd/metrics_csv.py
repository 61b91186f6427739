"""metrics.csv: every logged value of a run, one row per call, also across resumes."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from opd.metrics_rows import read_metrics


class MetricsCSV(Logger):
    """Appends rows to ``metrics.csv``; a resumed run replaces the rows that it does again.

    Lightning's CSVLogger deletes the file of the run that it resumes.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kw: Any) -> None:
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row; an unknown name becomes a new column."""
        row = {"step": str(step or 0), **{name: f"{v:.8g}" for name, v in metrics.items()}}
        if self._columns is None or not row.keys() <= set(self._columns):
            self._rewrite(row, first=self._columns is None)
        assert self._columns is not None
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self, row: Mapping[str, str], *, first: bool) -> None:
        """Write the file anew with the row's columns, without what a resume does again."""
        rows = read_metrics(self.path) if self.path.is_file() else []
        if first:
            rows = [old for old in rows if int(old["step"]) < int(row["step"])]
        names = {name for old in rows for name in old} | row.keys()
        self._columns = ["step", *sorted(names - {"step"})]
        temporary = self.path.with_suffix(".csv.tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)
