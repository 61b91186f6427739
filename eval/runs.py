"""Read run folders: what report, study and demo know about a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd.errors import UserError
from opd.metrics_csv import read_metrics

PHASES = ("rollout", "teacher", "train", "search")


@dataclass(frozen=True)
class Point:
    """A validation of a run.

    Attributes:
        step: Optimizer steps so far.
        accuracy: On held-out prompts; None without answers.
        reverse_kl: To the teacher, nats per token.
        seconds: Spent so far on rollouts, teacher, training and searches; validation left out.
        tokens: Generated so far, by rollouts and searches.
    """

    step: int
    accuracy: float | None
    reverse_kl: float
    seconds: float
    tokens: float


@dataclass
class Run:
    """A run folder, or a folder that holds only lm-eval results of a model.

    Attributes:
        name: Name of the folder.
        folder: The folder.
        points: Its validations, in order.
        summary: summary.json; empty for a folder with only lm-eval results.
        benchmarks: lm-eval scores by ``task/metric``, from ``evaluation/results.json``.
    """

    name: str
    folder: Path
    points: list[Point] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    benchmarks: dict[str, float] = field(default_factory=dict)

    @property
    def searches(self) -> list[dict[str, Any]]:
        """The extrapolations, as summary.json lists them."""
        return list(self.summary.get("extrapolation", []))

    def reached(self, accuracy: float) -> Point | None:
        """Return the first validation with at least this accuracy."""
        return next((p for p in self.points if (p.accuracy or 0.0) >= accuracy), None)


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: The folder does not exist or holds neither a run nor lm-eval results.
    """
    run = Run(folder.name, folder)
    results = folder / "evaluation" / "results.json"
    if not results.is_file():
        results = folder / "results.json"
    if results.is_file():
        run.benchmarks = dict(_read_json(results)["results"])
    if (folder / "summary.json").is_file() and (folder / "metrics.csv").is_file():
        run.summary = _read_json(folder / "summary.json")
        run.points = read_points(read_metrics(folder / "metrics.csv"))
    elif not run.benchmarks:
        missing = "holds neither a run nor results.json" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder}: {missing}; expected a folder that opd fit has written")
    return run


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def read_points(rows: Sequence[dict[str, str]]) -> list[Point]:
    """Join validations with what had been spent by their step."""
    costs = {
        int(row["step"]): (
            sum(float(row[f"cost/{phase}_seconds"]) for phase in PHASES),
            float(row["cost/rollout_tokens"]) + float(row["cost/search_generated_tokens"]),
        )
        for row in rows
        if "cost/rollout_seconds" in row
    }
    return [
        Point(
            step=int(row["step"]),
            accuracy=float(row["val/accuracy"]) if "val/accuracy" in row else None,
            reverse_kl=float(row["val/reverse_kl"]),
            seconds=costs.get(int(row["step"]), (0.0, 0.0))[0],
            tokens=costs.get(int(row["step"]), (0.0, 0.0))[1],
        )
        for row in rows
        if "val/reverse_kl" in row
    ]
