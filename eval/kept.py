"""What an evaluation has done so far, kept as it comes: after a kill, it goes on with the rest.

In the output folder are ``completions/TASK.RANK.jsonl``, a line per completion, and, until the
evaluation ends, ``verdicts/TASK.jsonl``, a line per verdict; scored again, it begins anew. What a
kill has cut is not read. A completion is known by all that it depends on (model, prompt, sampler,
seed), and a verdict by its text and problem: none is ever taken for another.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed

from eval.benchmarks.scoring import Verdict
from eval.files import append_lines, read_lines

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


def question(text: str, doc: Mapping[str, Any]) -> str:
    """Return a digest of a completion and of the problem that it is to solve."""
    asked = repr((text, doc.get("id"), doc.get("reference")))
    return hashlib.sha256(asked.encode("utf-8", "replace")).hexdigest()[:32]


class Kept:
    """Completions and verdicts by task.

    Args:
        folder: Output folder; None: in memory only.
        rank: This process.
        world_size: Number of processes, each of which adds completions. The first adds verdicts.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0, world_size: int = 1) -> None:
        self.folder = folder
        self.rank = rank
        self.world_size = world_size
        self._completions: dict[str, dict[Key, Generated]] = {}
        self._verdicts: dict[str, dict[str, Verdict]] = {}

    def completions(self, task: str) -> Mapping[Key, Generated]:
        """Return what is known of a task."""
        if task not in self._completions:
            self._completions[task] = {}
            self._read_completions(task)
        return self._completions[task]

    def add_completions(self, task: str, new: Mapping[Key, Generated]) -> None:
        """Keep what has just been generated.

        Raises:
            UserError: It cannot be written.
        """
        self._completions.setdefault(task, {}).update(new)
        if self.folder is not None:
            append_lines(
                self.folder / "completions" / f"{task}.{self.rank}.jsonl",
                (dict(zip(KEY, key, strict=True)) | vars(made) for key, made in new.items()),
            )

    def gather(self) -> None:
        """Give the first process the completions of the others; all of them together."""
        if self.world_size == 1:
            return
        parts: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        torch.distributed.gather_object(self._completions, parts)
        for part in parts or ():
            for task, generated in part.items():
                self._completions.setdefault(task, {}).update(generated)

    def _read_completions(self, task: str) -> None:
        if self.folder is None:
            return
        for path in sorted((self.folder / "completions").glob(f"{task}.*.jsonl")):
            for record in read_lines(path):
                with contextlib.suppress(KeyError, TypeError):  # none of ours
                    problem, copy, digest = (record.pop(name) for name in KEY)
                    self._completions[task][problem, copy, digest] = Generated(**record)

    def verdicts(self, task: str) -> Mapping[str, Verdict]:
        """Return the verdicts of a task, by :func:`question`."""
        if task not in self._verdicts:
            self._verdicts[task] = {}
            if self.folder is not None and (path := self._verdicts_of(task)).is_file():
                for record in read_lines(path):
                    with contextlib.suppress(KeyError, TypeError):  # none of ours
                        digest = record.pop("digest")
                        self._verdicts[task][digest] = Verdict(**record)
        return self._verdicts[task]

    def add_verdict(self, task: str, digest: str, verdict: Verdict) -> None:
        """Keep a verdict.

        Raises:
            UserError: It cannot be written.
        """
        self._verdicts.setdefault(task, {})[digest] = verdict
        if self.folder is not None:
            append_lines(self._verdicts_of(task), [{"digest": digest, **vars(verdict)}])

    def forget_verdicts(self) -> None:
        """Remove the files of verdicts: the evaluation is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder / "verdicts", ignore_errors=True)

    def _verdicts_of(self, task: str) -> Path:
        assert self.folder is not None
        return self.folder / "verdicts" / f"{task}.jsonl"
