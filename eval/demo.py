"""``make demo``: the main job on the embedded pair, with the commands that a user would type."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from eval.report import benchmark_table, run_table, text_table
from eval.runs import read_runs


@dataclass(frozen=True)
class Demo:
    """Runs that share a recipe, and what comes of them.

    Attributes:
        output: Folder of all that is written.
        fit: Options of ``opd fit`` for every run.
        runs: Further options of each run, by its name.
        models: What else is evaluated, by name.
        evaluate: Options of ``opd evaluate``.
        target: Accuracy for the columns "to target".
        runs_at_once: Processes that train side by side, each with its share of the processors.
        evaluations_at_once: Processes that evaluate side by side, likewise.
    """

    output: Path
    fit: Sequence[str]
    runs: Mapping[str, Sequence[str]]
    models: Mapping[str, str]
    evaluate: Sequence[str]
    target: float
    runs_at_once: int = 1
    evaluations_at_once: int = 1

    def run(self) -> None:
        """Train, evaluate, report, and say where to look."""
        start = time.perf_counter()
        with ThreadPoolExecutor(self.runs_at_once) as pool:
            list(pool.map(self._fit, self.runs))
        evaluated = [(model, self.output / name) for name, model in self.models.items()]
        evaluated += [
            (
                str(self.output / name / "checkpoints" / "last.ckpt"),
                self.output / name / "evaluation",
            )
            for name in self.runs
        ]
        with ThreadPoolExecutor(self.evaluations_at_once) as pool:
            list(pool.map(lambda pair: self._evaluate(*pair), evaluated))
        folders = [self.output / name for name in [*self.models, *self.runs]]
        page = str(self.output / "report.html")
        opd("report", *map(str, folders), "--output", page, "--target", f"{self.target:g}")

        runs = read_runs(folders)
        print("\n" + text_table(*run_table(runs, self.target)))
        print("\n" + text_table(*benchmark_table(runs)))
        print(f"\n{time.perf_counter() - start:.0f} seconds. Next:")
        print(f"  open {page}")
        print(
            f"  {os.path.relpath(Path(sys.executable).parent)}/tensorboard --logdir {self.output}"
        )
        print("  README.md, 'Your own student, teacher and prompts'")

    def _fit(self, name: str) -> None:
        options = [*self.fit, *self.runs[name], "--output", str(self.output / name)]
        opd("fit", *options, threads=_share(self.runs_at_once))

    def _evaluate(self, model: str, folder: Path) -> None:
        options = [*self.evaluate, "--output", str(folder), "--overwrite", "true"]
        opd("evaluate", "--model", model, *options, threads=_share(self.evaluations_at_once))


def _share(processes: int) -> int:
    """Return how many threads each process may have."""
    return max((os.cpu_count() or 1) // processes, 1)


def opd(*args: str, threads: int | None = None) -> None:
    """Run one command in a process of its own, as from a shell, with so many threads at most."""
    print("$ opd " + shlex.join(args), flush=True)
    command = [sys.executable, "-m", "opd.cli", *args]
    environment = dict(os.environ)
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        print(finished.stdout + finished.stderr, file=sys.stderr)
        sys.exit(finished.returncode)


# Learning rates of vanilla OPD on the embedded pair
TOO_SMALL, BEST, TOO_LARGE = "3e-6", "3e-4", "1e-2"

QUICKSTART = Demo(
    output=Path("runs/quickstart"),
    fit=["--config", "quickstart", "--overwrite", "true"],
    runs={
        f"{name}-{rate}": [*options, "--model.optimizer.lr", rate]
        for name, rates, options in [
            ("vanilla", [TOO_SMALL, BEST, TOO_LARGE], []),
            ("effopd-auto", [TOO_SMALL, TOO_LARGE], ["--config", "effopd/auto"]),
        ]
        for rate in rates
    },
    models={"base": "embedded:base", "teacher": "embedded:teacher"},
    evaluate=["--tasks", "arithmetic"],
    target=0.95,
    runs_at_once=2,
    evaluations_at_once=2,  # start-up is most of it and uses one core
)

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition(":")[2]).parse_args()  # there are none
    QUICKSTART.run()
