"""Run folders written by hand."""

import csv
import json
import os
import time
from pathlib import Path

VALIDATED = "accuracy reverse_kl student_entropy kl_above_5"
VALIDATED = [f"val/{name}" for name in VALIDATED.split()]
COSTS = "rollout_seconds teacher_seconds train_seconds search_seconds validation_seconds"
COSTS = [f"cost/{name}" for name in COSTS.split()]
COSTS += [f"cost/{kind}_tokens" for kind in ("rollout", "search_generated", "search", "teacher")]


def write_run(folder: Path, validations: list, costs: dict, searches: list) -> Path:
    """Write the files of a run.

    Args:
        folder: The run folder.
        validations: (step, and the first so many of VALIDATED).
        costs: By step, a value for each of COSTS.
        searches: For summary.json.
    """
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *VALIDATED, *COSTS])
        writer.writeheader()
        for step, *values in validations:
            writer.writerow({"step": step, **dict(zip(VALIDATED, values, strict=False))})
        for step, values in costs.items():
            writer.writerow({"step": step, **dict(zip(COSTS, values, strict=True))})
    last = max(costs)
    summary = {
        "steps": last,
        "accuracy": {"initial": validations[0][1], "final": validations[-1][1]},
        "reverse_kl": {"initial": validations[0][2], "final": validations[-1][2]},
        "cost": {n.removeprefix("cost/"): v for n, v in zip(COSTS, costs[last], strict=True)},
        "extrapolation": searches,
        "versions": {"opd": "9.8.7"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def search(step, coefficient, *candidates):
    tried = [{"coefficient": c, "score": s, "accepted": c == coefficient} for c, s in candidates]
    return {
        **{"step": step, "coefficient": coefficient, "candidates": tried},
        **{"seconds": 0.25 * step, "tokens": 1000 * step + 234},
    }


def fails_at_once(command: list[str]) -> int:
    """Stands for the command line; here, where processes that are started import it quickly.

    A validation has been written by then.
    """
    folder = Path(command[command.index("--output") + 1])
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    print("opd fit: error: it is broken")
    return 2


def goes_on(command: list[str]) -> int:
    """Stands for the command line too: says who it is, and takes a minute."""
    folder = Path(command[command.index("--output") + 1])
    folder.with_name("process").write_text(str(os.getpid()))
    time.sleep(60)
    return 0


if __name__ == "__main__":
    import sys

    from eval.study.trials import run_all

    run_all({"trial": ([], [])}, Path(sys.argv[1]), 1, 1, goes_on, done=0)
