"""``make demo``: the main job on the embedded pair, with the commands that a user would type."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eval.report import benchmark_table, run_table, text_table
from eval.runs import read_runs

OUTPUT = Path("runs/quickstart")
RUNS: dict[str, list[str]] = {
    "vanilla": [],
    "effopd-paper": ["--config", "effopd/paper"],
    "effopd-line-search": ["--config", "effopd/line_search"],
}
MODELS = {"base": "embedded:base", "teacher": "embedded:teacher"}
TARGET = 0.95


def main() -> None:
    """Train, evaluate, report, and say where to look."""
    argparse.ArgumentParser(description=__doc__.partition(":")[2]).parse_args()  # there are none
    start = time.perf_counter()
    for name, extra in RUNS.items():
        options = ["--output", str(OUTPUT / name), "--overwrite", "true"]
        opd("fit", "--config", "quickstart", *extra, *options)
    evaluated = [(model, OUTPUT / name) for name, model in MODELS.items()]
    evaluated += [
        (str(OUTPUT / name / "checkpoints" / "last.ckpt"), OUTPUT / name / "evaluation")
        for name in RUNS
    ]
    with ThreadPoolExecutor(2) as pool:  # start-up is most of it and uses one core
        list(pool.map(lambda pair: evaluate(*pair), evaluated))
    folders = [OUTPUT / name for name in [*MODELS, *RUNS]]
    opd("report", *map(str, folders), "--output", str(OUTPUT / "report.html"))

    runs = read_runs(folders)
    print("\n" + text_table(*run_table(runs, TARGET)))
    print("\n" + text_table(*benchmark_table(runs)))
    print(f"\n{time.perf_counter() - start:.0f} seconds. Next:")
    print(f"  open {OUTPUT / 'report.html'}")
    print(f"  {os.path.relpath(Path(sys.executable).parent)}/tensorboard --logdir {OUTPUT}")
    print("  README.md, 'Your own student, teacher and prompts'")


def evaluate(model: str, folder: Path) -> None:
    """Evaluate one model on the embedded task."""
    options = ["--tasks", "arithmetic", "--output", str(folder), "--overwrite", "true"]
    opd("evaluate", "--model", model, *options)


def opd(*args: str) -> None:
    """Run one command in a process of its own, as from a shell."""
    print("$ opd " + shlex.join(args), flush=True)
    command = [sys.executable, "-m", "opd.cli", *args]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(finished.stdout + finished.stderr)


if __name__ == "__main__":
    main()
