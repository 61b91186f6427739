"""``opd study``: accelerators x learning rates x seeds until a target accuracy."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import re
import statistics
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from eval.figures import png, steps_to_target
from eval.files import output_folder, write_files
from eval.report import text_table
from eval.runs import check_target, read_run
from opd.cli import recipes
from opd.errors import UserError

STOPPER = "lightning.pytorch.callbacks.EarlyStopping"
NEVER = str(10**9)  # steps
RESULTS = ("results.json", "results.md", "results.png")
FINISHED = "finished"  # in the folder of a trial: what it was made with
SET_BY = {  # options of a trial that follow from the study, and what of it says so
    **{"--output": "output", "--overwrite": "output", "--seed_everything": "seeds"},
    **{
        "--model.optimizer.lr": "learning_rates",
        "--model.optimizer.init_args.lr": "learning_rates",
    },
    **{"--trainer.max_steps": "max_steps", "--trainer.val_check_interval": "check_every"},
}


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    accelerator: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder; no two trials of a study have the same."""
        return f"{self.accelerator}_lr{self.learning_rate}_seed{self.seed}"


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

    A finished trial is not run again, so an interrupted study goes on where it was; one that was
    made with other settings is.

    Args:
        recipe: Configuration of vanilla OPD: a file, or a name of those in configs/.
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

    Raises:
        UserError: An option is out of range, a configuration does not exist, or a trial failed.
    """
    _check_names(accelerators, arguments)
    _check_numbers(learning_rates, seeds)
    check_target(target)
    for name, number in [
        *(("max_steps", max_steps), ("check_every", check_every)),
        *(("workers", workers), ("threads", threads)),
    ]:
        if number < 1:
            raise UserError(f"{name} {number} must be at least 1")
    recipe = recipes.find(recipe, "recipe")
    presets = {
        name: recipes.find(preset, f"accelerators.{name}") if preset else None
        for name, preset in accelerators.items()
    }
    trials = [
        Trial(name, rate, seed)
        for seed in seeds
        for name in accelerators
        for rate in learning_rates
    ]
    defaults = [
        *("--trainer.enable_progress_bar", "false"),
        *("--checkpoint.every_n_train_steps", NEVER, "--samples.every_n_steps", NEVER),
    ]
    common = [
        *("--trainer.max_steps", str(max_steps), "--trainer.val_check_interval", str(check_every)),
        *(f"--trainer.callbacks+={STOPPER}", "--trainer.callbacks.monitor", "val/accuracy"),
        *("--trainer.callbacks.mode", "max", "--trainer.callbacks.patience", "1000000"),
        *("--trainer.callbacks.stopping_threshold", str(target)),
    ]
    with output_folder(output) as folder:
        taken = [name for name in RESULTS if (folder / name).exists()]
        if taken and not any(folder.glob(f"*/{FINISHED}")):
            raise UserError(f"output {output}: would replace {taken[0]}, which is of no study")
        waiting: dict[Trial, tuple[list[str], list[str]]] = {}
        for trial in trials:
            preset = presets[trial.accelerator]
            command = [
                *("fit", "--config", recipe, *(("--config", preset) if preset else ())),
                *(*defaults, *arguments, "--model.optimizer.lr", str(trial.learning_rate)),
                *("--seed_everything", str(trial.seed), *common),
            ]
            made_with = [f"opd {importlib.metadata.version('opd')}", f"{threads} threads"]
            made_with += map(fingerprint, command)
            if not _is_finished(folder / trial.name, made_with):
                waiting[trial] = command, made_with
        _run_all(waiting, folder, workers, threads, opd, done=len(trials) - len(waiting))
        outcomes = [_outcome(trial, folder / trial.name, target) for trial in trials]
        _write(outcomes, folder, target, max_steps)


def _check_names(accelerators: Mapping[str, str | None], arguments: Sequence[str]) -> None:
    if not accelerators:
        raise UserError("accelerators: names none; for vanilla OPD alone: {vanilla: null}")
    for name in accelerators:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(
                f"accelerators: {name!r} names folders: begin with a letter, and use letters, "
                "digits, _, -, + and . only"
            )
    for argument in arguments:
        if key := SET_BY.get(argument.partition("=")[0]):
            raise UserError(f"arguments: {argument} is set for every trial; change {key} instead")


def _check_numbers(learning_rates: Sequence[float], seeds: Sequence[int]) -> None:
    for name, values in [("learning_rates", learning_rates), ("seeds", seeds)]:
        if not values:
            raise UserError(f"{name}: names none")
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise UserError(f"{name}: {twice[0]} is there twice")
    for rate in learning_rates:
        if not (rate > 0 and math.isfinite(rate)):
            raise UserError(f"learning_rates: {rate} must be above 0")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"seeds: {seed} must be at least 0 and below 2**32")


# --- what a trial was made with -------------------------------------------------------------------


def fingerprint(word: str) -> str:
    """A word of a command; where it names a file, what is in it instead of where it lies.

    The files that a configuration names, such as prompts, count as parts of it.
    """
    option, equals, value = word.partition("=")
    path = _file(value or word)
    if path is None:
        return word
    digest = hashlib.sha256(path.read_bytes())
    if path.suffix in (".yaml", ".yml", ".json"):
        for named in map(
            _file, re.findall(r"[^\s\"',\[\]{}]+", path.read_text("utf-8", "replace"))
        ):
            digest.update(named.read_bytes() if named is not None else b"")
    return f"{option}{equals}" * bool(value) + f"{path.name} {digest.hexdigest()[:16]}"


def _file(text: str) -> Path | None:
    with contextlib.suppress(OSError, ValueError):  # of what is no path
        path = Path(text).expanduser()
        if path.is_file():
            return path
    return None


def _is_finished(folder: Path, made_with: Sequence[str]) -> bool:
    """Whether a trial need not be run; says so of one that was made with something else."""
    finished = folder / FINISHED
    if not finished.is_file():
        return False
    try:
        earlier = [str(word) for word in json.loads(finished.read_text(encoding="utf-8"))]
    except (TypeError, ValueError):
        earlier = []
    if earlier == made_with:
        return True
    pairs = enumerate(zip(earlier, made_with, strict=False))
    i, (old, new) = next((p for p in pairs if p[1][0] != p[1][1]), (0, ("others", "these")))
    option = f"{made_with[i - 1]} " if i and made_with[i - 1].startswith("--") else ""
    print(f"{folder.name}: was made with {option}{old}, not {new}, and runs again", flush=True)
    return False


# --- running --------------------------------------------------------------------------------------


def _run_all(
    waiting: Mapping[Trial, tuple[list[str], list[str]]],
    folder: Path,
    workers: int,
    threads: int,
    opd: Callable[[Sequence[str]], int],
    *,
    done: int,
) -> None:
    """Run trials; after a failure none begins any more.

    Args:
        waiting: Command of each trial, and what it is made with.
        folder: Of the study.
        workers: Runs at a time.
        threads: Threads per run.
        opd: Runs a command.
        done: How many need not be run.

    Raises:
        UserError: One has failed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _set_threads, (threads,)) as pool:
        futures = {
            pool.submit(_run, opd, command, made_with, folder / trial.name): trial
            for trial, (command, made_with) in waiting.items()
        }
        try:
            for i, future in enumerate(as_completed(futures), start=done + 1):
                future.result()
                print(f"[{i}/{done + len(futures)}] {futures[future].name}", flush=True)
        except BrokenProcessPool as error:
            raise UserError(
                "a trial has ended its process (out of memory?); the same command goes on with "
                "the others"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _run(
    opd: Callable[[Sequence[str]], int],
    command: Sequence[str],
    made_with: Sequence[str],
    folder: Path,
) -> None:
    """Run one trial in this process, and remember what it was made with.

    Its output goes beside the run folder, which is the run's alone.

    Raises:
        UserError: It has failed; says what it said last.
    """
    finished, output = folder / FINISHED, folder.with_name(f"{folder.name}.log")
    finished.unlink(missing_ok=True)
    with (
        output.open("w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            failed = bool(opd([*command, "--output", str(folder), "--overwrite", "true"]))
        except (Exception, SystemExit):
            failed = True
            traceback.print_exc()
    if failed or not folder.is_dir():
        lines = output.read_text(encoding="utf-8").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "it has not run")
        raise UserError(f"{folder.name} failed ({said.strip()}); see {output}")
    finished.write_text(json.dumps(made_with, indent=0) + "\n", encoding="utf-8")


def _outcome(trial: Trial, folder: Path, target: float) -> Outcome:
    run = read_run(folder)
    judged = [point for point in run.points if point.accuracy is not None]
    if not judged:
        raise UserError(f"{folder}: no accuracy was measured; set data.validation, with answers")
    reached = run.reached(target)
    return Outcome(
        trial,
        steps=reached.step if reached else None,
        tokens=reached.tokens if reached else None,
        seconds=reached.seconds if reached else None,
        search_share=run.search_share or 0.0,
        final_accuracy=judged[-1].accuracy or 0.0,
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
    contents: list[str | bytes] = [
        json.dumps([asdict(o) for o in outcomes], indent=2) + "\n",
        table + "\n",
        png(steps_to_target(steps, target, max_steps)),
    ]
    write_files({folder / name: content for name, content in zip(RESULTS, contents, strict=True)})
    print(table)
    print(f"wrote {folder / 'results.md'}, results.json and results.png")


def _median(values: Sequence[float | None], form: str) -> str:
    """Median over all seeds; a dash if any did not reach the target."""
    known = [v for v in values if v is not None]
    return format(statistics.median(known), form) if len(known) == len(values) else "-"
