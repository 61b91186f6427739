"""Benchmarks of reasoning models: one table, one converter a format, one scorer a kind.

``tasks/`` holds the table, a YAML for each benchmark, which is its lm-eval task too. A row of a
data set becomes a problem (``formats``, ``code``), a completion gets a verdict (``scoring``), and a
problem its metrics (``tasks``). A new benchmark of a known format is one more YAML.
"""

from eval.benchmarks.rows import data_folder, load_rows, use_data
from eval.benchmarks.scoring import Completion, Scorer, Verdict, scorer_of
from eval.benchmarks.table import (
    Benchmark,
    benchmarks,
    benchmarks_in,
    read_benchmark,
    task_folders,
    use_tasks,
)
from eval.benchmarks.tasks import Problems, load_problems

__all__ = [
    "Benchmark",
    "Completion",
    "Problems",
    "Scorer",
    "Verdict",
    "benchmarks",
    "benchmarks_in",
    "data_folder",
    "load_problems",
    "load_rows",
    "read_benchmark",
    "scorer_of",
    "task_folders",
    "use_data",
    "use_tasks",
]
