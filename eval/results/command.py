r"""Runs OPD and RL from one base, analyses both, and says what agrees with the paper.

    python -m eval.results.command

or, of a pair of yours, with a study whose methods are called ``opd`` and ``rl``, with one learning
rate each and several checkpoints that are kept (configs/study/results.yaml is one); and with what
scores weights::

    python -m eval.results.command --study my_study.yaml --base MODEL --tasks TASKS \
      --teacher MODEL --prompts DATA --output DIR

Then it runs accelerators at several learning rates: of the built-in pair all of study/controls, of
their seeds the first; of another the study that ``--accelerators`` names.

It ends with ``results.md``, ``results.html`` and the figures of ``opd analyze``, means over seeds.
What has been finished with the same options is not done again.
"""

from __future__ import annotations

import argparse
import csv
import html
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from eval.analyze.pages import ANALYSES, contents
from eval.analyze.updates import Row
from eval.benchmarks import use_tasks
from eval.demo import opd
from eval.files import write_files
from eval.harness import Settings, check_tasks
from eval.report import html_table, image, text_table
from eval.results.findings import OPD, RL, Answer, Finding, answered, last, verdict
from eval.study.grid import Trial
from opd.errors import UserError

TABLES = ("norms", "matrices", "directions", "planes", "spectra", "lock_in", *ANALYSES)
OWN_STUDY, ACCELERATORS = "study/results", "accelerators"
SUMMARY, MADE_OF = "summary.json", "made_of.json"  # of a run; of an analysis of ours
NUMBERS = ("step", "layer", "matrices", "percent", "centre")  # whole ones, beside names
KEYS = (  # what a row is about
    *("run", "step", "matrix", "layer", "kind", "group"),
    *("a", "weights", "centre", "matrices", "part", "percent", "b"),
)
MEASURES = {
    "spectral_norm": "spectral norm",
    "spectral_ratio": "spectral norm / Frobenius norm",
    "effective_rank": "effective rank",
    "top_ratio": "norm of the top 1%",
}
# RL / OPD at 1.5B, 4B, 8B and 14B parameters (2605.11739, table 1)
PAPER = {
    "spectral_norm": ".094 / .113, .007 / .009, .004 / .005, .056 / .063",
    "spectral_ratio": ".332 / .396, .197 / .257, .327 / .368, .244 / .281",
    "effective_rank": "964 / 778, 1908 / 1587, 2754 / 2341, 3174 / 2937",
    "top_ratio": ".781 / .923, .792 / .934, .885 / .947, .812 / .945",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of it; returns an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.results.command",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default, about in [
        ("study", OWN_STUDY, "YAML with methods opd and rl"),
        ("base", "embedded:base", "what both begin with"),
        ("tasks", "arithmetic", "lm-eval tasks that score weights"),
        ("limit", "128", "problems and prompts of a score"),
        ("teacher", "embedded:teacher", "model that the KL is taken to"),
        ("prompts", "embedded:test", "prompts that it is taken on"),
        ("max_new_tokens", "32", "longest completion of a score; a model that reasons needs more"),
        ("output", "runs/results", "folder for everything"),
    ]:
        parser.add_argument(f"--{name}", default=default, help=f"{about} (default: {default})")
    parser.add_argument("--accelerators", help="YAML of a study of accelerators, as above")
    for name in ("samples", "data", "include_path", "device"):
        parser.add_argument(f"--{name}", help="as of opd analyze")
    options = {k: value for k, value in vars(parser.parse_args(argv)).items() if value is not None}
    output, study = Path(options.pop("output")), options.pop("study")
    accelerators = _accelerators(study, options.pop("accelerators", None))
    try:
        _check(options)  # before anything is trained
        opd("study", "--config", study, "--output", str(output / "study"))
        trials = by_seed(output / "study")
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(_analyze, output, seed, of, options) for seed, of in trials.items()]
            found = {seed: job.result() for seed, job in zip(trials, jobs, strict=True)}
        if accelerators:
            opd("study", *accelerators, "--output", str(output / ACCELERATORS))
        write_files({output / name: content for name, content in results(found, output).items()})
    except UserError as error:
        print(f"eval.results: error: {error}", file=sys.stderr)
        return 2
    print((output / "results.md").read_text("utf-8"))
    return 0


def _check(options: Mapping[str, str]) -> None:
    """Make sure that weights can be scored.

    Raises:
        UserError: A task is not there, or a number is none or out of range.
    """
    numbers: dict[str, Any] = {}
    for name in ("samples", "limit", "max_new_tokens"):
        if name in options:
            try:
                numbers[name] = int(options[name])
            except ValueError as error:
                raise UserError(f"--{name} {options[name]}: is no whole number") from error
    if (folder := options.get("include_path")) is not None:
        use_tasks(folder)
    check_tasks([name.strip() for name in options["tasks"].split(",")], Settings(**numbers))


def _accelerators(study: str, accelerators: str | None) -> list[str]:
    """Return the options of their study; none if there is to be none."""
    if accelerators is not None:
        return ["--config", accelerators]
    return ["--config", "study/controls", "--seeds", "[0]"] if study == OWN_STUDY else []


def by_seed(study: Path) -> dict[int, dict[str, Path]]:
    """Return the runs of a study, by seed and method.

    Raises:
        UserError: They are not one of opd and one of rl for every seed.
    """
    found: dict[int, dict[str, Path]] = {}
    for trial in json.loads((study / "results.json").read_text("utf-8"))["trials"]:
        about = trial["trial"]
        method, seed = about["method"], about["seed"]
        name = Trial(method, about["learning_rate"], seed).name
        if method in found.setdefault(seed, {}) or not (study / name).is_dir():
            raise UserError(f"--study: {method} needs one learning rate, and no grid")
        found[seed][method] = study / name
    if any(runs.keys() != {OPD, RL} for runs in found.values()):
        raise UserError(f"--study: its methods must be called {OPD} and {RL}")
    return found


def _analyze(
    output: Path, seed: int, runs: Mapping[str, Path], options: Mapping[str, str]
) -> dict[str, list[Row]]:
    folder = output / f"seed{seed}"
    summaries = {label: json.loads((runs[label] / SUMMARY).read_text("utf-8")) for label in runs}
    made_of = json.dumps({"options": options, "runs": summaries}, sort_keys=True)
    note = folder / MADE_OF
    if not note.is_file() or note.read_text("utf-8") != made_of:
        sources = [f"{label}={runs[label]}" for label in (OPD, RL)]
        given = [word for name, value in options.items() for word in (f"--{name}", value)]
        given += ["--output", str(folder), "--overwrite", "true"]
        opd("analyze", "--checkpoints", *sources, *given, threads=1)
        write_files({note: made_of})
    return read_tables(folder)


def read_tables(folder: Path) -> dict[str, list[Row]]:
    """Read the tables that ``opd analyze`` has written."""
    found = {}
    for name in TABLES:
        path = folder / f"{name}.csv"
        if path.is_file():
            with path.open(newline="") as file:
                found[name] = [
                    {key: _value(key, text) for key, text in row.items() if text}
                    for row in csv.DictReader(file)
                ]
    return found


def _value(key: str, text: str) -> Any:
    if key in NUMBERS:
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def mean_over_seeds(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """Average the numbers of rows that are about the same thing, in the order of the first seed."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for rows in tables:
        for row in rows:
            found.setdefault(tuple(row.get(key) for key in KEYS), []).append(row)
    means = []
    for rows in found.values():
        mean = dict(rows[0])
        for name, value in rows[0].items():
            if name not in KEYS and isinstance(value, float):
                values = [row[name] for row in rows if name in row]  # a direction fewer in some
                mean[name] = sum(values) / len(values)
        means.append(mean)
    return means


def results(found: Mapping[int, Mapping[str, list[Row]]], output: Path) -> dict[str, str | bytes]:
    """Lay everything out: files by name."""
    seeds = ", ".join(map(str, found))
    names = [name for name in TABLES if all(name in tables for tables in found.values())]
    means = {name: mean_over_seeds([tables[name] for tables in found.values()]) for name in names}
    means["planes"] = next(iter(found.values()))["planes"]  # a plane of one seed is none of another
    chosen = [name for name in ANALYSES if name == "layers" or name in means]
    about = f"Means over seeds {seeds}; the plane of u_1 is of the first."
    files = contents(chosen, means, about)
    table = paper_table(found)
    answers = list(answered(found))
    sections = [
        ("What the paper finds, and what is found here", findings_table(answers)),
        ("Table 1 of the paper: RL / OPD", table),
    ]
    text = ["# OPD beside RL", "", about, ""]
    for title, rows in sections:
        text += [f"## {title}", "", text_table(*rows), ""]
    cost = output / ACCELERATORS / "results.md"
    if cost.is_file():
        text += ["## Accelerators", "", cost.read_text("utf-8")]
    page = str(files.pop("analysis.html"))
    head = "".join(f"<h2>{html.escape(t)}</h2>{html_table(*rows)}" for t, rows in sections)
    for title, folder in [("Accuracy", "study"), ("Accelerators", ACCELERATORS)]:
        picture = output / folder / "results.png"
        if picture.is_file():
            head += f"<h2>{title}</h2>{image(f'cost: {title}', picture.read_bytes())}"
    files["results.html"] = page.replace("<h2>Norms</h2>", f"{head}<h2>Norms</h2>", 1)
    files["results.md"] = "\n".join(text)
    return files


def findings_table(
    answers: Sequence[tuple[Finding, Mapping[int, Answer]]],
) -> tuple[list[str], list[list[str]]]:
    """Lay findings out, a row each."""
    header = ["the paper's finding", "section", "here", "numbers, seed by seed"]
    rows = [
        [f.says, f.section, verdict(of), "; ".join(answer.numbers for answer in of.values())]
        for f, of in answers
    ]
    return header, rows


def paper_table(
    found: Mapping[int, Mapping[str, list[Row]]],
) -> tuple[list[str], list[list[str]]]:
    """Lay table 1 out: spectra of the last updates, mean and range over seeds."""
    rows = []
    for measure, name in MEASURES.items():
        cells = []
        for run in (RL, OPD):
            values = [float(last(t["spectra"], run)[0][measure]) for t in found.values()]
            mean = sum(values) / len(values)
            cells.append(f"{mean:.3g} ({min(values):.3g} to {max(values):.3g})")
        rows.append([name, *cells, PAPER[measure]])
    return ["mean over matrices", "RL", "OPD", "paper, RL / OPD at 1.5B, 4B, 8B, 14B"], rows


if __name__ == "__main__":
    sys.exit(main())
