"""Run the trials of a study, several at a time, and only those that have not been run like this."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from opd.errors import UserError

FINISHED = "finished"  # in the folder of a trial: what it was made with


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


def is_finished(folder: Path, made_with: Sequence[str]) -> bool:
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


def run_all(
    waiting: Mapping[str, tuple[list[str], list[str]]],
    folder: Path,
    workers: int,
    threads: int,
    opd: Callable[[Sequence[str]], int],
    *,
    done: int,
) -> None:
    """Run trials; after a failure none begins any more.

    Args:
        waiting: Command of each trial by its name, and what it is made with.
        folder: Of the study.
        workers: Runs at a time.
        threads: Threads per run.
        opd: Runs a command.
        done: How many need not be run.

    Raises:
        UserError: One has failed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin, (threads, os.getpid())) as pool:
        futures = {
            pool.submit(_run, opd, command, made_with, folder / name): name
            for name, (command, made_with) in waiting.items()
        }
        try:
            for i, future in enumerate(as_completed(futures), start=done + 1):
                diverged = future.result()
                note = f": {diverged}" if diverged else ""
                print(f"[{i}/{done + len(futures)}] {futures[future]}{note}", flush=True)
        except BrokenProcessPool as error:
            raise UserError(
                "a trial has ended its process (out of memory?); the same command goes on with "
                "the others"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(threads: int, parent: int) -> None:
    """Set up a process that runs trials: how many threads it has, and that it ends with its parent.

    A study that is killed leaves none behind, which would stand in the way of the one that goes on.
    """
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(
    opd: Callable[[Sequence[str]], int],
    command: Sequence[str],
    made_with: Sequence[str],
    folder: Path,
) -> str:
    """Run one trial in this process, and remember what it was made with.

    Its output goes beside the run folder, which is the run's alone. One that has diverged is done
    too: it has not reached the target.

    Returns:
        What one has said that has diverged; nothing of the others.

    Raises:
        UserError: It has failed; says what it said last.
    """
    from opd.step import ADVICE

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
    diverged = ""
    if failed or not folder.is_dir():
        lines = output.read_text(encoding="utf-8").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "it has not run").strip()
        if ADVICE not in said or not (folder / "summary.json").is_file():
            raise UserError(f"{folder.name} failed ({said}); see {output}")
        diverged = said.partition(ADVICE)[0]
    finished.write_text(json.dumps(made_with, indent=0) + "\n", encoding="utf-8")
    return diverged
