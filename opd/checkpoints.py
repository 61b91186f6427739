"""Checkpoints on disk: one file, or under FSDP a folder with a shard from every rank.

Both hold the student's weights under ``student.NAME`` and, under ``student_files``, its config and
tokenizer, so that a checkpoint is a model by itself; or those of its adapter, where only that is
trained. Nothing here needs a GPU, a process group or
as many processes as the checkpoint was saved with.

A folder is written under another name and then renamed, and a file is written the same way by
Lightning: what has the final name is whole, unless something cut it short afterwards.
"""

from __future__ import annotations

import logging
import pickle
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from opd.errors import UserError

log = logging.getLogger(__name__)

STUDENT_PREFIX = "student."
STUDENT_FILES = "student_files"  # key: config and tokenizer, file by file
STATE_DICT = "state_dict"
META_FILE = "meta.pt"  # of a folder: all but tensors; Lightning's name
SAVED_AS = "saved_as"  # key: the name under which a run has saved it, in its checkpoints/
PARTIAL = ".partial"  # suffix of a folder that is being written
REPLACED = "old-"  # prefix of one whose name a newer one is about to take


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint rather than a folder with a model, or nothing."""
    return path.is_file() or is_sharded(path)


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder with shards."""
    return (path / META_FILE).is_file() or (path / ".metadata").is_file()


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, of a folder all but its shards; a file's tensors are mapped, not read.

    Raises:
        UserError: It is no checkpoint of ours, or not a whole one.
    """
    if flaw := find_flaw(path):
        raise UserError(f"{path}: is not a whole checkpoint: {flaw}")
    try:
        file = path / META_FILE if path.is_dir() else path
        checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch.load raises whatever the broken file provokes
        raise UserError(f"{path}: cannot be read as a checkpoint ({error})") from error
    if not isinstance(checkpoint, dict) or STUDENT_FILES not in checkpoint:
        raise UserError(f"{path}: is not a checkpoint of opd fit")
    return checkpoint


def read_student(path: Path, weights: dict[str, Tensor]) -> None:
    """Read the student's weights into tensors, by name; those of shards without a further copy.

    Raises:
        UserError: The checkpoint cannot be read, lacks a weight, or holds another or one of another
            shape.
    """
    prefixed = {STUDENT_PREFIX + name: tensor for name, tensor in weights.items()}
    if path.is_dir():
        found = {
            key.removeprefix(f"{STATE_DICT}."): tuple(tensor.size)
            for key, tensor in shard_metadata(path).state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        _check_student(path, prefixed, found)
        read_shards(path, {STATE_DICT: prefixed}, no_dist=True)
    else:
        state = read(path)[STATE_DICT]
        _check_student(path, prefixed, {name: tuple(t.shape) for name, t in state.items()})
        for name, tensor in prefixed.items():
            tensor.copy_(state[name])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all weights of the student that a checkpoint holds, whole, by name.

    Raises:
        UserError: It cannot be read.
    """
    if path.is_dir():
        found = {
            STUDENT_PREFIX + name: torch.empty(meta.size, dtype=meta.properties.dtype)
            for name, meta in student_metadata(path).items()
        }
        read_shards(path, {STATE_DICT: found}, no_dist=True)
    else:
        found = read(path)[STATE_DICT]
    return {
        name.removeprefix(STUDENT_PREFIX): tensor
        for name, tensor in found.items()
        if name.startswith(STUDENT_PREFIX)
    }


def read_shards(path: Path, state: dict[str, Any], *, no_dist: bool = False) -> None:
    """Read shards of a folder into tensors; a collective unless ``no_dist``.

    Raises:
        UserError: The folder lacks some, or holds them in another shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            load_shards(state, checkpoint_id=path, no_dist=no_dist)
    except CheckpointException as error:
        raise UserError(f"{path}: does not fit this run ({first_reason(error)})") from error


def first_reason(error: CheckpointException) -> str:
    """Say why the first of the ranks that failed has failed."""
    rank, (reason, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {reason}"


def _check_student(
    path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a checkpoint whose weights of the student are not exactly those wanted.

    Callbacks' tensors may be beside them.
    """
    ours = {name for name in found if name.startswith(STUDENT_PREFIX)}
    if missing := sorted(wanted.keys() - ours):
        raise UserError(f"{path}: lacks {len(missing)} of the model's weights, as {missing[0]}")
    if beyond := sorted(ours - wanted.keys()):
        raise UserError(f"{path}: holds {len(beyond)} weights beyond the model's, as {beyond[0]}")
    for name, tensor in wanted.items():
        if found[name] != tuple(tensor.shape):
            raise UserError(
                f"{path}: {name} has shape {list(found[name])}, its config says "
                f"{list(tensor.shape)}"
            )


def find_misfit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """Say where the student's weights in a checkpoint are others than a module's; None: nowhere."""
    for name in sorted({*wanted, *found}):
        if not name.startswith(STUDENT_PREFIX):
            continue
        ours, theirs = (list(s[name].shape) if name in s else "absent" for s in (wanted, found))
        if ours != theirs:
            return f"{name.removeprefix(STUDENT_PREFIX)} is {theirs} there and {ours} here"
    return None


def student_metadata(path: Path) -> dict[str, TensorStorageMetadata]:
    """Read which weights of the student a folder holds, by name.

    Raises:
        UserError: It cannot be read.
    """
    prefix = f"{STATE_DICT}.{STUDENT_PREFIX}"
    return {
        key.removeprefix(prefix): meta
        for key, meta in shard_metadata(path).state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(meta, TensorStorageMetadata)
    }


def shard_metadata(path: Path) -> Metadata:
    """Read which tensors a folder holds, and where.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return FileSystemReader(path).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: its .metadata cannot be read ({error})") from error


def find_flaw(path: Path) -> str | None:
    """Say what a checkpoint lacks; None if it is whole."""
    if not path.is_dir():
        return None if zipfile.is_zipfile(path) else "the file is cut short or of another format"
    if path.name.endswith(PARTIAL):
        return "it was still being written"
    for name in (META_FILE, ".metadata"):
        if not (path / name).is_file():
            return f"{name} is missing"
    if not zipfile.is_zipfile(path / META_FILE):
        return f"{META_FILE} is cut short"
    try:
        metadata = shard_metadata(path)
    except UserError as error:
        return str(error)
    needed: dict[str, int] = defaultdict(int)
    for part in metadata.storage_data.values():
        needed[part.relative_path] = max(needed[part.relative_path], part.offset + part.length)
    for name, size in needed.items():
        file = path / name
        if not file.is_file():
            return f"shard {name} is missing"
        if file.stat().st_size < size:
            return f"shard {name} is cut short"
    return None


def find_all(folder: Path) -> list[Path]:
    """List the checkpoints in and below a folder, whole or not; neither links nor hidden ones."""
    paths = [*folder.rglob("*.ckpt"), *folder.rglob(f"*.ckpt{PARTIAL}")]
    return [path for path in paths if not path.is_symlink() and not path.name.startswith(".")]


def read_step(path: Path) -> int:
    """Read after how many steps a checkpoint was saved.

    Raises:
        UserError: It is no checkpoint to go on from.
    """
    checkpoint = read(path)
    if "callbacks" not in checkpoint:
        raise UserError(f"{path}: holds weights only, nothing to go on from")
    return int(checkpoint["global_step"])


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the whole checkpoint of the latest step, also in subfolders.

    One that nothing can go on from is named and passed over. The time of a file tells nothing: a
    copy is newer than what it was made from.
    """
    steps: dict[Path, tuple[int, int]] = {}
    for path in find_all(folder):
        try:
            if flaw := find_flaw(path):
                raise UserError(flaw)
            steps[path] = (read_step(path), path.stat().st_mtime_ns)
        except UserError as error:
            log.warning("%s is passed over: %s", path, error)
    return max(steps, key=lambda path: steps[path], default=None)
