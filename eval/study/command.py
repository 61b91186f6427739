"""``opd study``: which method needs how much to reach an accuracy, at which learning rate."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.files import output_folder, write_files
from eval.runs import check_target, read_run
from eval.study import grid as grids
from eval.study.results import RESULTS, Study, contents, tables
from eval.study.trials import FINISHED, fingerprint, is_finished, run_all
from opd.cli import recipes
from opd.errors import UserError

STOPPER = "lightning.pytorch.callbacks.EarlyStopping"
NEVER = str(10**9)  # steps
DEFAULTS = [  # of trials, which leave nothing but numbers: hundreds of them are run
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--checkpoint.every_n_train_steps", NEVER, "--checkpoint.save_end", "false"),
    *("--samples.every_n_steps", "0", "--samples.held_out", "0"),
]


def study(
    recipe: str,
    output: str,
    methods: dict[str, Any] = {},  # noqa: B006 - never changed
    accelerators: dict[str, Any] = {},  # noqa: B006
    learning_rates: list[float] = [],  # noqa: B006
    grid: dict[str, Any] = {},  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    baseline: str | None = None,
    target: float = 0.95,
    stop_at_target: bool = True,
    max_steps: int = 128,
    check_every: int = 2,
    arguments: list[str] = [],  # noqa: B006
    workers: int = 1,
    threads: int = 1,
    *,
    opd: Callable[[Sequence[str]], int],
) -> None:
    """Run a grid until a target accuracy and compare methods with a baseline, seed by seed.

    A finished trial is not run again, so an interrupted study goes on where it was; one that was
    made with other settings is.

    Args:
        recipe: Configuration of vanilla OPD: a file, or a name of those in configs/.
        output: Folder for the runs, results.json, results.md, results.png and results.html.
        methods: What is compared, by name: null for the recipe alone; a configuration stacked on
            it, or a list of them; or a mapping with configs, arguments (of opd fit) and
            learning_rates of its own, each of which may be left out.
        accelerators: The same; what methods were called first.
        learning_rates: Learning rates of the methods that name none.
        grid: Values by key of opd fit, as {--model.temperature: [0.7, 1.0]}; every combination is
            run with every method, and methods are compared within each.
        seeds: Seeds.
        baseline: The method that the others are compared with; null: the first.
        target: Held-out accuracy to reach.
        stop_at_target: Whether a run ends there. If not, it ends at max_steps, and means over all
            steps and late swings are known too.
        max_steps: Optimizer steps at which a run stops at the latest.
        check_every: Steps between validations.
        arguments: Further arguments of opd fit, for every run.
        workers: Runs at a time.
        threads: Threads per run.
        opd: Runs a command of the front door and returns its exit code; it can be pickled.

    Raises:
        UserError: An option is out of range, a configuration does not exist, or a trial failed.
    """
    if learning_rates:
        learning_rates = grids.check_rates("learning_rates", learning_rates)
    grids.check_arguments("arguments", arguments)
    grids.check_seeds(seeds)
    check_target(target)
    for name, number in [
        *(("max_steps", max_steps), ("check_every", check_every)),
        *(("workers", workers), ("threads", threads)),
    ]:
        if number < 1:
            raise UserError(f"{name} {number} must be at least 1")
    chosen = [
        *grids.read_methods("methods", methods, learning_rates),
        *grids.read_methods("accelerators", accelerators, learning_rates),
    ]
    first = _baseline(baseline, [method.name for method in chosen])
    recipe = recipes.find(recipe, "recipe")
    trials = grids.trials(chosen, grids.read_grid(grid), seeds)
    by_name = {method.name: method for method in chosen}
    common = [
        *("--trainer.max_steps", str(max_steps), "--trainer.val_check_interval", str(check_every)),
    ]
    if stop_at_target:
        common += [
            *(f"--trainer.callbacks+={STOPPER}", "--trainer.callbacks.monitor", "val/accuracy"),
            *("--trainer.callbacks.mode", "max", "--trainer.callbacks.patience", "1000000"),
            *("--trainer.callbacks.stopping_threshold", str(target)),
        ]
    with output_folder(output) as folder:
        _check_folder(folder, output)
        waiting: dict[str, tuple[list[str], list[str]]] = {}
        for trial in trials:
            method = by_name[trial.method]
            configs = [word for config in method.configs for word in ("--config", config)]
            command = [
                *("fit", "--config", recipe, *configs),
                *(*DEFAULTS, *arguments, *method.arguments, *trial.arguments, *common),
            ]
            made_with = [f"opd {importlib.metadata.version('opd')}", f"{threads} threads"]
            made_with += map(fingerprint, command)
            if not is_finished(folder / trial.name, made_with):
                waiting[trial.name] = command, made_with
        run_all(waiting, folder, workers, threads, opd, done=len(trials) - len(waiting))
        runs = {trial: read_run(folder / trial.name) for trial in trials}
        done = Study.of(runs, baseline=first, target=target, max_steps=max_steps)
        write_files({folder / name: content for name, content in contents(done).items()})
        print(tables(done))
        print(f"wrote {', '.join(RESULTS)} to {folder}")


def _baseline(baseline: str | None, names: Sequence[str]) -> str:
    if not names:
        raise UserError("methods: names none; for vanilla OPD alone: {vanilla: null}")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"accelerators: {twice[0]} is one of methods too; give it another name")
    if baseline is not None and baseline not in names:
        raise UserError(f"baseline {baseline}: is none of the methods {', '.join(names)}")
    return names[0] if baseline is None else baseline


def _check_folder(folder: Path, output: str) -> None:
    taken = [name for name in RESULTS if (folder / name).exists()]
    if taken and not any(folder.glob(f"*/{FINISHED}")):
        raise UserError(f"output {output}: would replace {taken[0]}, which is of no study")
