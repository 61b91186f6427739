"""``opd evaluate --compare A B``: is B better than A, problem by problem?"""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from eval.statistics import Estimate, macro, paired_difference
from eval.tables import per_problem
from opd.errors import UserError


def compare_results(first: Path, second: Path) -> None:
    """Print the difference of two evaluations per task, and of all tasks with the same weight.

    Args:
        first: Folder with results, A.
        second: Folder with results, B; positive differences are in its favour.

    Raises:
        UserError: A folder holds no results, or they have no task or problem in common.
    """
    a, b = _read(first), _read(second)
    common = [task for task in a if task in b]
    if not common:
        raise UserError(
            f"--compare: {first} has {', '.join(a)}, and {second} has {', '.join(b)}: no task in "
            "common"
        )
    estimates = {task: paired_difference(b[task], a[task]) for task in common}
    lines = [f"B - A: {second} - {first}", ""]
    lines += ["| task | problems | B - A | 95% interval |", "|---|---|---|---|"]
    lines += [_row(task, estimate) for task, estimate in estimates.items()]
    if len(estimates) > 1:
        lines.append(_row("all tasks alike", macro(list(estimates.values()))))
    print("\n".join(lines))
    for task in common:
        if len(a[task]) != len(b[task]) or set(a[task]) != set(b[task]):
            print(f"{task}: only problems that both have count")


def _row(task: str, estimate: Estimate) -> str:
    interval = ""
    if estimate.low is not None and estimate.high is not None:
        interval = f"{estimate.low:+.4f} to {estimate.high:+.4f}"
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:.4f}"
    return f"| {task} | {estimate.n} | {estimate.mean:+.4f}{error} | {interval} |"


def _read(folder: Path) -> dict[str, dict[Hashable, float]]:
    """Read avg@n of each problem, by task and by the problem's name."""
    files = sorted(folder.glob("samples_*.jsonl")) if folder.is_dir() else []
    if not files:
        raise UserError(f"--compare {folder}: holds no results of opd evaluate --output")
    found = {}
    for path in files:
        try:
            samples = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            values = per_problem(samples, "avg@")
            names: list[Any] = [sample.get("id", sample["doc_id"]) for sample in samples]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--compare {path}: is damaged ({type(error).__name__})") from error
        if values is not None:
            found[path.stem.removeprefix("samples_")] = dict(zip(names, values[1], strict=True))
    if not found:
        raise UserError(f"--compare {folder}: none of its tasks has avg@n")
    return found
