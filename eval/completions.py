"""The completions of an evaluation, kept as they come: after a kill, it goes on with the rest.

On disk they are ``completions/TASK.RANK.jsonl`` in the output folder, one line per completion. What
a chunk has given is written in one go; a line that a kill has cut is not read. A completion is
known by all that it depends on (model, prompt, sampler, seed): it is never taken for another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed

from opd.errors import UserError

Key = tuple[int, int, str]  # problem of its task and copy, from 0; digest of what it depends on
KEY = ("problem", "copy", "digest")


@dataclass(frozen=True)
class Generated:
    """What a model has written.

    Attributes:
        text: The completion, without special tokens.
        tokens: Its length in tokens, its end included.
        truncated: Whether it was cut at the limit rather than ended; None: nobody knows.
    """

    text: str
    tokens: int
    truncated: bool | None


class Completions:
    """Completions by task, problem and copy.

    Args:
        folder: Where they are kept; None: in memory only.
        rank: This process.
        world_size: Number of processes, each of which adds some.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0, world_size: int = 1) -> None:
        self.folder = folder
        self.rank = rank
        self.world_size = world_size
        self._known: dict[str, dict[Key, Generated]] = {}

    def of(self, task: str) -> Mapping[Key, Generated]:
        """Return what is known of a task."""
        if task not in self._known:
            self._known[task] = {}
            self._read(task)
        return self._known[task]

    def add(self, task: str, new: Mapping[Key, Generated]) -> None:
        """Keep what has just been generated.

        Raises:
            UserError: It cannot be written.
        """
        self._known.setdefault(task, {}).update(new)
        if self.folder is None:
            return
        lines = [
            json.dumps(dict(zip(KEY, key, strict=True)) | vars(generated)) + "\n"
            for key, generated in new.items()
        ]
        path = self.folder / f"{task}.{self.rank}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                if file.tell() and not _ends_a_line(path):  # what a kill has left
                    file.write(b"\n")
                file.write("".join(lines).encode())
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error

    def exchange(self, tasks: Iterable[str]) -> None:
        """Give each process what the others have added; all of them together."""
        if self.world_size == 1:
            return
        if self.folder is not None:
            torch.distributed.barrier()
            for task in tasks:
                self._read(task)
            return
        parts: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(parts, self._known)
        for part in parts:
            for task, generated in part.items():
                self._known.setdefault(task, {}).update(generated)

    def _read(self, task: str) -> None:
        if self.folder is None:
            return
        for path in sorted(self.folder.glob(f"{task}.*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                    problem, copy, digest = (record.pop(name) for name in KEY)
                    self._known[task][problem, copy, digest] = Generated(**record)
                except (ValueError, KeyError, TypeError, AttributeError):  # cut by a kill
                    continue


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"
