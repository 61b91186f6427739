"""``opd study``: accelerators x learning rates x seeds until a target accuracy."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from eval.figures import png, steps_to_target
from eval.report import text_table
from eval.runs import read_run
from opd.errors import UserError

STOPPER = "lightning.pytorch.callbacks.EarlyStopping"


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    accelerator: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.accelerator}_lr{self.learning_rate:g}_seed{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a trial needed to reach the target; None where it did not.

    Attributes:
        trial: The trial.
        steps: Optimizer steps.
        tokens: Generated tokens, those of searches included.
        seconds: Wall-clock of rollouts, teacher, training and searches, without validation.
        search_share: Share of all its seconds that went into searches.
        final_accuracy: At the end, whether the target was reached or not.
    """

    trial: Trial
    steps: int | None
    tokens: float | None
    seconds: float | None
    search_share: float
    final_accuracy: float


def study(
    recipe: str,
    accelerators: dict[str, str | None],
    learning_rates: list[float],
    output: str,
    seeds: list[int] = [0, 1, 2],  # noqa: B006 - never changed
    target: float = 0.95,
    max_steps: int = 128,
    check_every: int = 2,
    arguments: list[str] = [],  # noqa: B006 - never changed
    workers: int = 1,
    threads: int = 1,
    *,
    opd: Callable[[Sequence[str]], int],
) -> None:
    """Run a grid until a target accuracy and compare.

    A finished trial is not run again, so an interrupted study goes on where it was.

    Args:
        recipe: Configuration of vanilla OPD.
        accelerators: Configuration stacked on the recipe, by name; null for none.
        learning_rates: Learning rates.
        output: Folder for the runs, results.json, results.md and results.png.
        seeds: Seeds.
        target: Held-out accuracy at which a run stops.
        max_steps: Optimizer steps at which it stops at the latest.
        check_every: Steps between validations.
        arguments: Further arguments of opd fit, for every run.
        workers: Runs at a time.
        threads: Threads per run.
        opd: Runs a command of the front door and returns its exit code; it can be pickled.
    """
    folder = Path(output).expanduser()
    for path in [recipe, *(a for a in accelerators.values() if a)]:
        if not Path(path).is_file():
            raise UserError(f"{path}: there is no such configuration")
    trials = [
        Trial(name, rate, seed)
        for seed in seeds
        for name in accelerators
        for rate in learning_rates
    ]
    common = [
        *("--trainer.max_steps", str(max_steps), "--trainer.val_check_interval", str(check_every)),
        *("--trainer.enable_progress_bar", "false", "--overwrite", "true"),
        *("--checkpoint.every_n_train_steps", str(max_steps + 1)),
        *("--samples.every_n_steps", str(max_steps + 1)),
        *(f"--trainer.callbacks+={STOPPER}", "--trainer.callbacks.monitor", "val/accuracy"),
        *("--trainer.callbacks.mode", "max", "--trainer.callbacks.patience", "1000000"),
        *("--trainer.callbacks.stopping_threshold", str(target)),
    ]
    commands = {}
    for trial in trials:
        preset = accelerators[trial.accelerator]
        commands[trial] = [
            *("fit", "--config", recipe),
            *(("--config", preset) if preset else ()),
            *("--output", str(folder / trial.name), "--seed_everything", str(trial.seed)),
            *("--model.optimizer.lr", str(trial.learning_rate), *common, *arguments),
        ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _set_threads, (threads,)) as pool:
        futures = {
            trial: pool.submit(_run, opd, command, folder / trial.name)
            for trial, command in commands.items()
        }
        for i, (trial, future) in enumerate(futures.items(), start=1):
            future.result()
            print(f"[{i}/{len(trials)}] {trial.name}", flush=True)
    outcomes = [_outcome(trial, folder / trial.name, target) for trial in trials]
    _write(outcomes, folder, target, max_steps)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _run(opd: Callable[[Sequence[str]], int], command: Sequence[str], folder: Path) -> None:
    """Run one trial in this process; skip it if it has finished before.

    Its output goes beside the run folder, which is the run's alone.
    """
    done = folder / "finished"
    if done.is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    output = folder.with_name(f"{folder.name}.log")
    with (
        output.open("w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        code = opd(command)
    if code:
        raise UserError(f"{folder.name} failed; see {output}")
    done.touch()


def _outcome(trial: Trial, folder: Path, target: float) -> Outcome:
    run = read_run(folder)
    reached = run.reached(target)
    last = run.points[-1]
    return Outcome(
        trial,
        steps=reached.step if reached else None,
        tokens=reached.tokens if reached else None,
        seconds=reached.seconds if reached else None,
        search_share=run.summary["cost"]["search_seconds"] / last.seconds,
        final_accuracy=last.accuracy or 0.0,
    )


def _write(outcomes: Sequence[Outcome], folder: Path, target: float, max_steps: int) -> None:
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for outcome in outcomes:
        key = (outcome.trial.accelerator, outcome.trial.learning_rate)
        groups.setdefault(key, []).append(outcome)
    header = [
        *("accelerator", "learning rate", "reached", f"steps to {target:g}"),
        *("generated tokens", "seconds", "search share", "final accuracy"),
    ]
    rows = []
    for (name, rate), group in sorted(groups.items(), key=lambda item: item[0][1]):
        reached = [o for o in group if o.steps is not None]
        rows.append(
            [
                name,
                f"{rate:g}",
                f"{len(reached)}/{len(group)}",
                ", ".join(f">{max_steps}" if o.steps is None else str(o.steps) for o in group),
                _median([o.tokens for o in group], ",.0f"),
                _median([o.seconds for o in group], ".1f"),
                f"{statistics.median(o.search_share for o in group):.0%}",
                ", ".join(f"{o.final_accuracy:.3f}" for o in group),
            ]
        )
    steps: dict[str, dict[float, list[float | None]]] = {}
    for (name, rate), group in groups.items():
        steps.setdefault(name, {})[rate] = [o.steps for o in group]
    table = text_table(header, rows)
    (folder / "results.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n")
    (folder / "results.md").write_text(table + "\n", encoding="utf-8")
    (folder / "results.png").write_bytes(png(steps_to_target(steps, target, max_steps)))
    print(table)
    print(f"wrote {folder / 'results.md'}, results.json and results.png")


def _median(values: Sequence[float | None], form: str) -> str:
    """Median over all seeds; a dash if any did not reach the target."""
    known = [v for v in values if v is not None]
    return format(statistics.median(known), form) if len(known) == len(values) else "-"
