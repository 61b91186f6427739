"""Read run folders: what report, study and demo know about a run.

Folders are copied, cut and edited: what a file lacks is said in one line, which names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd import geometry_rows
from opd.errors import UserError
from opd.geometry_rows import MatrixRow
from opd.metrics_rows import read_metrics

PHASES = ("rollout", "teacher", "train", "search")
COSTS = (*(f"{phase}_seconds" for phase in PHASES), "rollout_tokens", "search_generated_tokens")

# What a JSON file must hold, as a value of that form: types, text, a list of one item, or the keys
# of an object. It may have more keys, and lack those with a question mark.
Shape = Any
NUMBER = (int, float)
KNOWN = (int, float, type(None))
SEARCH = {
    **{"step": NUMBER, "seconds": NUMBER, "tokens": NUMBER, "coefficient?": KNOWN},
    "candidates?": [{"coefficient": NUMBER, "score": NUMBER}],
}
SUMMARY = {
    "steps": NUMBER,
    "accuracy": {"initial": KNOWN, "final": KNOWN},
    "reverse_kl": {"initial": KNOWN, "final": KNOWN},
    "cost": dict.fromkeys(COSTS, NUMBER),
    "extrapolation": [SEARCH],
    "versions": {},
}
RESULTS: Shape = {"results": {}}


@dataclass(frozen=True)
class Point:
    """A validation of a run.

    Attributes:
        step: Optimizer steps so far.
        accuracy: On held-out prompts; None without answers.
        reverse_kl: To the teacher, nats per token; None if it is not known.
        seconds: Spent so far on rollouts, teacher, training and searches; validation left out.
            None if this step's cost has not been logged.
        tokens: Generated so far, by rollouts and searches; likewise.
        student_entropy: Of the student, nats per token; None if it is not known.
        kl_above_5: Share of tokens whose reverse KL is; likewise.
    """

    step: int
    accuracy: float | None
    reverse_kl: float | None
    seconds: float | None
    tokens: float | None
    student_entropy: float | None = None
    kl_above_5: float | None = None


@dataclass
class Run:
    """A run folder, or a folder that holds only lm-eval results of a model.

    Attributes:
        name: Name of the folder.
        folder: The folder.
        points: Its validations, in order.
        summary: summary.json; empty for a folder with only lm-eval results.
        benchmarks: lm-eval scores by ``task/metric``, from ``evaluation/results.json``.
        benches: Scores on the way, by ``task/metric``: (step, value) in order.
        geometry: What callbacks.UpdateGeometry has logged, by metric: (step, value) in order.
        matrices: Its last rows in geometry.csv, all of one step.
    """

    name: str
    folder: Path
    points: list[Point] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    benchmarks: dict[str, float] = field(default_factory=dict)
    benches: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    geometry: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    matrices: list[MatrixRow] = field(default_factory=list)

    @property
    def searches(self) -> list[dict[str, Any]]:
        """The extrapolations, as summary.json lists them."""
        return list(self.summary.get("extrapolation", []))

    @property
    def seconds(self) -> float:
        """Spent on rollouts, teacher, training and searches."""
        return float(sum(self.summary["cost"][f"{phase}_seconds"] for phase in PHASES))

    @property
    def search_share(self) -> float | None:
        """Share of its seconds that went into searches; None if it has spent none."""
        searching = float(self.summary["cost"]["search_seconds"])
        return searching / self.seconds if self.seconds else None

    def reached(self, accuracy: float) -> Point | None:
        """Return the first validation with at least this accuracy."""
        return next((p for p in self.points if (p.accuracy or 0.0) >= accuracy), None)


def check_target(target: float) -> None:
    """Check an accuracy that runs are to reach.

    Raises:
        UserError: It is none.
    """
    if not 0 < target <= 1:
        raise UserError(f"--target {target:g} must be an accuracy above 0 and at most 1")


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several folders; those of equal names are called by their whole paths.

    Raises:
        UserError: One cannot be read, or is named twice.
    """
    whole = [folder.resolve() for folder in folders]
    for i, folder in enumerate(folders):
        if whole[i] in whole[:i]:
            raise UserError(f"{folder}: is named twice")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    return runs


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: The folder does not exist, holds neither a run nor lm-eval results, or one of
            its files is damaged.
    """
    run = Run(folder.resolve().name, folder)
    results = folder / "evaluation" / "results.json"
    if not results.is_file():
        results = folder / "results.json"
    if results.is_file():
        by_task = _read_json(results, RESULTS)["results"]
        check_shape(by_task, {task: {} for task in by_task}, results, "results")
        run.benchmarks = metrics_of(by_task)
    summary, metrics = folder / "summary.json", folder / "metrics.csv"
    if summary.is_file() and metrics.is_file():
        run.summary = _read_json(summary, SUMMARY)
        run.points = read_points(metrics)
        run.benches = read_benches(metrics)
        run.geometry = read_series(metrics, "geometry/")
        if (matrices := folder / geometry_rows.FILE).is_file():
            rows = geometry_rows.read_rows(matrices)
            run.matrices = [row for row in rows if row.step == rows[-1].step]
    elif not run.benchmarks:
        raise UserError(f"{folder}: {_why_not(folder)}; expected a folder that opd fit has written")
    return run


def _why_not(folder: Path) -> str:
    if not folder.is_dir():
        return "is no folder" if folder.exists() else "does not exist"
    for there, missing in [("summary.json", "metrics.csv"), ("metrics.csv", "summary.json")]:
        if (folder / there).is_file():
            return f"has {there}, but no {missing}"
    return "holds neither a run nor results.json"


def _read_json(path: Path, shape: Shape) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    check_shape(value, shape, path)
    return value


def check_shape(value: Any, shape: Shape, path: Path, *keys: str) -> None:
    """Compare a value of a JSON file with what it must hold.

    Raises:
        UserError: Something is missing or of another type; ``keys`` lead to it.
    """
    kinds: dict[type, str] = {dict: "an object", list: "a list", tuple: "a number", str: "text"}
    expected = shape if isinstance(shape, tuple) else type(shape)
    if not isinstance(value, expected) or isinstance(value, bool):
        found = json.dumps(value)
        found = found if len(found) < 40 else f"{found[:40]}..."
        place = ".".join(keys) or "it"
        raise UserError(f"{path}: {place} must be {kinds[type(shape)]}, not {found}")
    if isinstance(shape, list):
        for i, item in enumerate(value):
            check_shape(item, shape[0], path, *keys, str(i))
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            key = name.removesuffix("?")
            if key in value or key == name:
                check_shape(value.get(key), inner, path, *keys, key)


def read_points(metrics: Path) -> list[Point]:
    """Join validations with what had been spent by their step.

    Args:
        metrics: metrics.csv.

    Raises:
        UserError: It is damaged.
    """
    rows = read_metrics(metrics)
    if not rows:
        raise UserError(f"{metrics}: holds no rows; is it cut, or has the run not begun?")
    spent: dict[int, tuple[float, float]] = {0: (0.0, 0.0)}
    for row in rows:
        if any(f"cost/{name}" in row for name in COSTS):
            costs = {name: _number(row, f"cost/{name}", metrics) for name in COSTS}
            spent[int(row["step"])] = (
                sum(costs[f"{phase}_seconds"] for phase in PHASES),
                costs["rollout_tokens"] + costs["search_generated_tokens"],
            )
    points = []
    for row in rows:
        found = {
            name: _number(row, f"val/{name}", metrics) if f"val/{name}" in row else None
            for name in ("accuracy", "reverse_kl", "student_entropy", "kl_above_5")
        }
        if any(value is not None for value in found.values()):
            step = int(row["step"])
            cost = spent.get(step)
            seconds, tokens = cost if cost is not None else (None, None)
            points.append(Point(step, **found, seconds=seconds, tokens=tokens))
    return points


def read_benches(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """Read what callbacks.Benchmarks has logged; not what was before a search.

    Raises:
        UserError: It is damaged.
    """
    series = read_series(metrics, "bench/")
    return {name: points for name, points in series.items() if not name.endswith("/before")}


def read_series(metrics: Path, prefix: str) -> dict[str, list[tuple[int, float]]]:
    """Read what has been logged under names with a prefix, by the rest of the name.

    Returns:
        (step, value) in order.

    Raises:
        UserError: It is damaged.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(metrics):
        for column in row:
            if column.startswith(prefix):
                point = int(row["step"]), _number(row, column, metrics)
                found.setdefault(column.removeprefix(prefix), []).append(point)
    return found


def metrics_of(by_task: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Flatten ``results`` of lm-eval to ``<task>/<metric>``, without errors and filter names."""
    flat = {}
    for task, values in by_task.items():
        for key, value in values.items():
            metric = key.partition(",")[0]
            is_score = isinstance(value, int | float) and metric != "sample_len"
            if is_score and not metric.endswith("_stderr"):
                flat[f"{task}/{metric}"] = float(value)
    return flat


def _number(row: dict[str, str], column: str, metrics: Path) -> float:
    try:
        return float(row[column])
    except (KeyError, ValueError):
        found = repr(row[column]) if column in row else "nothing"
        raise UserError(
            f"{metrics}: step {row['step']}: {column} must be a number, not {found}"
        ) from None
