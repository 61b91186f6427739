"""The run folder: what in it a run of ours has written, and how a new run takes it over.

Nothing goes without ``--overwrite true``, and then only what a run has written: the marker says
that the folder is a run's, a file must bear a name of ours, and a checkpoint must itself say that
it was saved under the name that it bears (a copy under another name is the user's).

The old run is put aside when the new one is about to write, and goes when the new one has done its
first step. If the new one ends before, whatever the reason, the old one comes back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd import checkpoints
from opd.cli import ranks
from opd.errors import UserError
from opd.metrics_rows import read_metrics

log = logging.getLogger(__name__)

OUTPUT_VARIABLE = "OPD_OUTPUT"  # tells ranks that a launcher starts which folder rank 0 has chosen
MARKER = ".opd-run"
EVENTS_SUFFIX = ".opd"  # of TensorBoard files, which other programs call by the same name
NAMES = re.compile(
    r"\.opd-run|config\.yaml|hparams\.yaml|(metrics|geometry)\.csv(\.tmp)?|summary\.json(\.tmp)?"
    rf"|events\.out\.tfevents\..*{re.escape(EVENTS_SUFFIX)}"
)
SAMPLES = {
    "samples": re.compile(r"step_\d{6,}\.jsonl"),
    "validation": re.compile(r"step_\d{6,}\.jsonl|teacher\.jsonl"),
}
SHARD_FILES = re.compile(rf".*\.distcp|\.metadata|{re.escape(checkpoints.META_FILE)}")
ASIDE = ".replaced-"  # prefix of what has been put aside
REMEDY = "resume it with --ckpt_path last, choose another folder, or replace it"


@dataclass(frozen=True)
class Start:
    """How a fit begins.

    Attributes:
        folder: The run folder.
        checkpoint: What it goes on from; None: it starts anew.
        replaces: Files and folders of an earlier run that go when this one has done a step.
    """

    folder: Path
    checkpoint: Path | None = None
    replaces: tuple[Path, ...] = ()


def choose(output: str | None, configs: Sequence[str]) -> tuple[Path, list[Path]]:
    """Make the run folder and see that it can be written to.

    Args:
        output: What ``--output`` names.
        configs: Configuration files, whose first names the default folder.

    Returns:
        The folder; the folders that were not there before, the innermost first.

    Raises:
        UserError: It cannot be written, or ranks that a launcher has started cannot know it.
    """
    if output is None and ranks.name() is not None:
        output = os.environ.get(OUTPUT_VARIABLE)
    if output is None:
        if ranks.world_size() > 1:
            raise UserError("name the run folder with --output when a launcher starts the ranks")
        recipe = Path(configs[0]).stem if configs else "opd"
        output = f"runs/{recipe}/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    os.environ[OUTPUT_VARIABLE] = output
    return make(output)


def make(output: str) -> tuple[Path, list[Path]]:
    """Make the folder that ``--output`` names and see that it can be written to.

    Returns:
        The folder; the folders that were not there before, the innermost first.

    Raises:
        UserError: It cannot.
    """
    if not output.strip():
        raise UserError(f"--output {output!r}: names no folder")
    folder = Path(output).expanduser()
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    return folder, made


def lock(folder: Path) -> int:
    """Keep other runs out of a folder, until this process ends or closes what it is given.

    Returns:
        A file descriptor.

    Raises:
        UserError: Another run is in it.
    """
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(place)
            raise UserError(
                f"--output {folder}: another run is writing there; choose another folder, or wait "
                "until it has ended"
            ) from error
        log.debug("%s: cannot be locked (%s)", folder, error)  # some network file systems
    return place


def plan(folder: Path, wanted: str | None, *, overwrite: bool) -> Start:
    """Decide whether and how a fit may begin in a folder; changes nothing.

    Args:
        folder: The run folder.
        wanted: ``--ckpt_path``: ``last``, a checkpoint, or None.
        overwrite: Whether what a run of ours has left there may go.

    Raises:
        UserError: Files that are not of a run of ours, or a run, would be mixed with this one; or
            there is no such checkpoint.
    """
    if not holds_a_run(folder) and (found := sorted(_visible(folder))):
        raise UserError(
            f"--output {folder}: is not empty and holds no run of opd (it has {found[0]}); name a "
            "new folder, or one inside it"
        )
    checkpoint = find_checkpoint(folder, wanted)
    if checkpoint is not None:
        checkpoints.read_step(checkpoint)  # or nothing can go on from it
    if checkpoint is not None and _is_within(checkpoint, folder):
        later = [] if wanted == "last" else _later(folder, checkpoint)
        if later and not overwrite:
            raise UserError(
                f"--ckpt_path {wanted}: {folder} has gone further, to {later[-1].name}; go on with "
                "--ckpt_path last, choose another --output, or drop what came after it with "
                "--overwrite true"
            )
        return Start(folder, checkpoint, tuple(path for path in files(folder) if path in later))
    if has_progress(folder) and not overwrite:
        if wanted == "last":
            raise UserError(
                f"--ckpt_path last: {folder} holds a run, but no checkpoint to go on from; choose "
                "another folder, or replace it with --overwrite true"
            )
        whose = f"--ckpt_path {wanted} is not of the run in it; " if checkpoint is not None else ""
        raise UserError(
            f"--output {folder}: already holds a run; {whose}{REMEDY} with --overwrite true"
        )
    if wanted == "last":
        log.warning("--ckpt_path last: %s holds no checkpoint; starting anew", folder)
    return Start(folder, checkpoint, tuple(files(folder)) if overwrite else ())


def find_checkpoint(folder: Path | None, wanted: str | None) -> Path | None:
    """Find what ``--ckpt_path`` names; None if that is nothing, or ``last`` finds nothing.

    Raises:
        UserError: There is no such checkpoint, it is none of ours, or there is no folder to look
            for the last one.
    """
    if wanted is None:
        return None
    if wanted != "last":
        path = Path(wanted).expanduser()
        if not path.exists():
            raise UserError(f"--ckpt_path {wanted}: there is no such checkpoint")
        if path.is_dir() and (path / "checkpoints").is_dir():
            raise UserError(
                f"--ckpt_path {wanted}: is a run folder; name a checkpoint in its checkpoints/, or "
                f"--output {wanted} --ckpt_path last"
            )
        if (path / "config.json").is_file():
            raise UserError(
                f"--ckpt_path {wanted}: is a model, nothing to go on from; train it with "
                f"--model.student {wanted}"
            )
        checkpoints.read(path)
        return path
    if folder is None:
        raise UserError("--ckpt_path last: name the run folder with --output")
    return checkpoints.newest_checkpoint(folder / "checkpoints")


def _is_within(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint is of the run in a folder; its checkpoints/ may be a link elsewhere."""
    places = (folder.resolve(), (folder / "checkpoints").resolve())
    return any(checkpoint.resolve().is_relative_to(place) for place in places)


def _later(folder: Path, checkpoint: Path) -> list[Path]:
    """Checkpoints of a folder that are of later steps than one, in the order of their steps."""
    step, steps = checkpoints.read_step(checkpoint), {}
    for path in checkpoints.find_all(folder / "checkpoints"):
        with contextlib.suppress(UserError):  # what cannot be read, is in nobody's way
            steps[path] = checkpoints.read_step(path)
    return sorted((path for path in steps if steps[path] > step), key=lambda path: steps[path])


def holds_a_run(folder: Path) -> bool:
    """Whether a run of ours has begun in a folder; a copy may lack the marker, which is hidden."""
    if (folder / MARKER).is_file() or _set_aside(folder):
        return True
    try:
        with (folder / "metrics.csv").open(encoding="utf-8") as file:
            names = file.readline().strip().split(",")
    except (OSError, UnicodeDecodeError):
        names = []
    if names[:1] == ["step"] and {"opd/loss", "val/reverse_kl"} & set(names):
        return True
    place = folder / "checkpoints"
    return any(_is_own(path, place) for path in checkpoints.find_all(place))


def has_progress(folder: Path) -> bool:
    """Whether a run has done a step, as far as its metrics or checkpoints tell."""
    if checkpoints.find_all(folder / "checkpoints"):
        return True
    metrics = folder / "metrics.csv"
    try:
        return metrics.is_file() and any(row["step"] != "0" for row in read_metrics(metrics))
    except UserError:  # damaged: something has been there
        return True


def files(folder: Path) -> list[Path]:
    """List what a run of ours has written into a folder, and nothing else.

    Sharded checkpoints are folders; links to what is listed are listed too.
    """
    if not holds_a_run(folder):
        return []
    found = [path for path in folder.glob("*") if NAMES.fullmatch(path.name) and path.is_file()]
    for name, pattern in SAMPLES.items():
        found += [path for path in folder.glob(f"{name}/*") if pattern.fullmatch(path.name)]
    place = folder / "checkpoints"
    own = [path for path in checkpoints.find_all(place) if _is_own(path, place)]
    links = [
        path
        for path in place.rglob("last*.ckpt")
        if path.is_symlink() and (not path.exists() or path.resolve() in [p.resolve() for p in own])
    ]
    return [*found, *own, *links]


def _is_own(path: Path, place: Path) -> bool:
    """Whether a checkpoint was saved by a run under the name that it has."""
    if path.name.endswith(checkpoints.PARTIAL):
        return path.is_dir() and all(SHARD_FILES.fullmatch(p.name) for p in path.iterdir())
    relative = path.relative_to(place)
    name = str(relative.with_name(relative.name.removeprefix(checkpoints.REPLACED)))
    try:
        return bool(checkpoints.read(path).get(checkpoints.SAVED_AS) == name)
    except UserError:
        return False


def _visible(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


# --- taking a folder over -------------------------------------------------------------------------


def begin(start: Start) -> None:
    """Put the old run aside and mark the folder as a run's; the first thing that a run writes.

    Raises:
        UserError: Another run has begun there meanwhile.
    """
    marker = start.folder / MARKER
    if start.checkpoint is None and not start.replaces and has_progress(start.folder):
        raise UserError(f"--output {start.folder}: another run has begun there just now")
    for path in start.replaces:
        path.rename(path.with_name(ASIDE + path.name))
    marker.write_text("A run of opd: --overwrite true replaces what it has written.\n", "utf-8")


def settle(folder: Path) -> None:
    """Delete what has been put aside: the new run has done its first step."""
    for path in _set_aside(folder):
        _delete(path)


def bring_back(folder: Path) -> None:
    """Undo :func:`begin`, if an earlier run has been put aside and is still there."""
    aside = _set_aside(folder)
    if not aside:
        return
    if any(path.name == ASIDE + MARKER for path in aside):  # all of a run, not its last steps only
        for path in files(folder):
            _delete(path)
    for path in aside:
        path.rename(path.with_name(path.name.removeprefix(ASIDE)))
    log.warning("%s: the earlier run is back, since the new one has done no step", folder)


def _set_aside(folder: Path) -> list[Path]:
    places = [folder.glob(f"{ASIDE}*"), *(folder.glob(f"{place}/{ASIDE}*") for place in SAMPLES)]
    return [path for place in places for path in place] + list(
        (folder / "checkpoints").rglob(f"{ASIDE}*")
    )


def _delete(path: Path) -> None:
    """Delete a file, or of a sharded checkpoint what we have written into it."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    for file in path.iterdir():
        if SHARD_FILES.fullmatch(file.name):
            file.unlink()
    if not any(path.iterdir()):
        path.rmdir()
    else:  # something of the user's is in it; the next checkpoint of that name would take its place
        name = path.name.removeprefix(ASIDE).removesuffix(".ckpt")
        kept = (path.with_name(f"{name}-kept{i or ''}") for i in itertools.count())
        path.rename(next(place for place in kept if not place.exists()))


def check_unread(start: Start, values: Iterable[object]) -> None:
    """Refuse to replace what the new run itself reads.

    Raises:
        UserError: An option names a file or folder that the new run would delete.
    """
    doomed = [path.resolve() for path in start.replaces]
    for value in sorted({value for value in values if isinstance(value, str) and value}):
        try:
            path = Path(value).expanduser().resolve()
        except (OSError, RuntimeError, ValueError):  # of text that is no path
            continue
        if any(path == old or old in path.parents for old in doomed):
            raise UserError(
                f"--overwrite true would delete {value}, which this run reads; choose another "
                "--output"
            )
