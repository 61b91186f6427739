"""The table of benchmarks: one YAML each, which is its lm-eval task as well, read and checked.

lm-eval's own keys say which data set (``dataset_path``, ``dataset_name``, ``test_split``), how
answers are sampled and how many (``generation_kwargs``, ``repeats``). ``metadata`` is the
benchmark's row of our table. ``dataset_kwargs`` is what its kind needs; the files of
``tasks/_shared`` give it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

from eval.benchmarks.formats import FORMATS
from opd.errors import UserError

TASKS = Path(__file__).parents[2] / "tasks"
MORE_TASKS = "OPD_TASKS"  # environment variable: a folder with tasks of the user's
NONE_SEEN = "none seen"
ScorerName = Literal["math", "choice", "code", "pattern"]

_TABLE = {
    *("version", "label", "revision", "files", "fields", "answer_after", "rows", "problems"),
    *("window", "first", "licence", "gated", "copy", "beware"),
}
_KIND = {"format", "scorer", "prompt", "prompt_call", "pattern", "seconds", "memory_gib"}


@dataclass(frozen=True)
class Copy:
    """A copy of a data set that needs no token: its address, and the SHA-256 of the file."""

    url: str
    sha256: str


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: which data set, how a row becomes a problem, how an answer is scored.

    Args:
        task: Its name, in lm-eval and in the table.
        label: Its name in reports, with the number of problems.
        source: Hub id of the data set, or ``embedded:NAME``.
        config: Configuration of the data set; None: its only one.
        split: Split of the data set.
        revision: Commit of the data set; None: nobody was seen to pin one, the newest is taken.
        files: Files of the repository to read as they are, where its script would be in the way.
        fields: Our name of a field -> the data set's name of it, or several.
        answer_after: The gold is what stands after the last such mark.
        rows: Rows that the split has; another number is refused.
        problems: Problems that are left of them; None: not known.
        window: First and last day of the contests that count.
        first: Gold of the first row, where it was seen.
        licence: Licence of the data set, as far as it was verified.
        gated: Whether the hub hands it out only to those who accepted its terms.
        copy: A copy that needs no token, if there is one.
        beware: What else bears its name.
        format: How a row becomes a problem, a key of ``FORMATS``.
        scorer: How an answer is scored.
        prompt: What the user says, with ``{problem}`` and other fields of the format.
        prompt_call: The same for a problem that asks for a function, not for a program.
        pattern: Regular expression of the answer, for the scorer ``pattern``.
        seconds: Time limit of one test of a program, unless the problem has its own.
        memory_bytes: Memory limit of a program, likewise.
        samples: Completions per problem.
        max_tokens: Longest completion, in tokens.
    """

    task: str
    label: str
    source: str
    split: str
    fields: Mapping[str, str | list[str]]
    rows: int
    format: str
    scorer: ScorerName
    prompt: str
    samples: int
    max_tokens: int
    licence: str
    gated: bool
    config: str | None = None
    revision: str | None = None
    files: tuple[str, ...] = ()
    answer_after: str | None = None
    problems: int | None = None
    window: tuple[date, date] | None = None
    first: str | None = None
    copy: Copy | None = None
    beware: str | None = None
    prompt_call: str | None = None
    pattern: str | None = None
    seconds: float | None = None
    memory_bytes: int | None = None

    @property
    def where(self) -> str:
        """The data set with its revision, configuration and split, for messages."""
        revision = f"@{self.revision}" if self.revision else ""
        config = f", {self.config}" if self.config else ""
        return f"{self.source}{revision}{config}, split {self.split}"


def read_benchmark(path: Path) -> Benchmark:
    """Read the YAML of a benchmark, with what it includes.

    Raises:
        UserError: It is no benchmark, lacks a key, has one that means nothing, or a wrong value.
    """
    return _Reader(path, _configuration(path)).benchmark()


def use_tasks(folder: str | Path) -> None:
    """Take tasks from one more folder, in this process and in those that it starts.

    Raises:
        UserError: There is no such folder.
    """
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"--include_path {folder}: is no folder")
    os.environ[MORE_TASKS] = str(folder)


def task_folders() -> tuple[Path, ...]:
    """Return the folders with tasks: ours, and the one that the user has named."""
    more = os.environ.get(MORE_TASKS, "").strip()
    return (TASKS, Path(more).expanduser()) if more else (TASKS,)


def benchmarks() -> dict[str, Benchmark]:
    """Return all benchmarks by name."""
    return {name: one for folder in task_folders() for name, one in benchmarks_in(folder).items()}


@functools.cache
def benchmarks_in(folder: Path) -> dict[str, Benchmark]:
    """Return the benchmarks of a folder by name: all its YAML files that take our data sets."""
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        config = _configuration(path)
        if "task" in config and "eval.benchmarks" in str(config.get("custom_dataset")):
            benchmark = _Reader(path, config).benchmark()
            found[benchmark.task] = benchmark
    return found


def _configuration(path: Path) -> dict[str, Any]:
    """Return what lm-eval reads of a task, functions as names."""
    from lm_eval.tasks._yaml_loader import load_yaml
    from yaml import YAMLError

    try:
        return dict(load_yaml(path, resolve_func=False))
    except (OSError, ValueError, TypeError, YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: is not the YAML of a benchmark ({reason})") from error


class _Reader:
    """Takes a benchmark out of a configuration, key by key."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self.config = config

    def benchmark(self) -> Benchmark:
        for section, known in [("metadata", _TABLE), ("dataset_kwargs", _KIND)]:
            given = self._take(section, dict)
            if unknown := sorted(map(str, set(given) - known)):
                raise UserError(
                    f"{self.path}: {section} has {', '.join(unknown)}, which mean nothing here; "
                    f"known are {', '.join(sorted(known))}"
                )
        kind = self._take("dataset_kwargs.format", str)
        scorer: Any = self._take("dataset_kwargs.scorer", str)
        self._one_of("dataset_kwargs.format", kind, FORMATS)
        self._one_of("dataset_kwargs.scorer", scorer, get_args(ScorerName))
        revision = self._take("metadata.revision", str)
        memory = self._take("dataset_kwargs.memory_gib", (int, float), None)
        if scorer == "code" and None in (memory, self._take("dataset_kwargs.seconds", Any, None)):
            raise UserError(f"{self.path}: code needs dataset_kwargs.seconds and memory_gib")
        if scorer == "pattern":
            self._take("dataset_kwargs.pattern", str)
        return Benchmark(
            task=self._take("task", str),
            label=self._take("metadata.label", str),
            source=self._take("dataset_path", str),
            config=self._take("dataset_name", str, None),
            split=self._take("test_split", str),
            revision=None if revision == NONE_SEEN else revision,
            files=tuple(self._take("metadata.files", list, [])),
            fields=self._fields(kind),
            answer_after=self._take("metadata.answer_after", str, None),
            rows=self._count("metadata.rows"),
            problems=self._count("metadata.problems", None),
            window=self._window(),
            first=self._take("metadata.first", str, None),
            licence=self._take("metadata.licence", str),
            gated=self._take("metadata.gated", bool),
            copy=self._copy(),
            beware=self._take("metadata.beware", str, None),
            format=kind,
            scorer=scorer,
            prompt=self._take("dataset_kwargs.prompt", str),
            prompt_call=self._take("dataset_kwargs.prompt_call", str, None),
            pattern=self._take("dataset_kwargs.pattern", str, None),
            seconds=self._take("dataset_kwargs.seconds", (int, float), None),
            memory_bytes=None if memory is None else int(memory * 2**30),
            samples=self._count("repeats"),
            max_tokens=self._count("generation_kwargs.max_gen_toks"),
        )

    def _take(self, key: str, kind: Any, *default: Any) -> Any:
        """Return the value of a key, or its default.

        Raises:
            UserError: It is missing, or of another kind.
        """
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            if default:
                return default[0]
            raise UserError(f"{self.path}: {key} is missing")
        if kind is not Any and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else [kind]))
            raise UserError(f"{self.path}: {key} must be {names}, got {value!r}")
        return value

    def _count(self, key: str, *default: Any) -> Any:
        value = self._take(key, int, *default)
        if value is not None and value < 1:
            raise UserError(f"{self.path}: {key} must be at least 1, got {value}")
        return value

    def _one_of(self, key: str, value: str, known: Any) -> None:
        if value not in known:
            raise UserError(f"{self.path}: {key} {value!r} must be one of {', '.join(known)}")

    def _fields(self, kind: str) -> dict[str, Any]:
        fields = self._take("metadata.fields", dict)
        needed, possible = FORMATS[kind].needed, FORMATS[kind].needed | FORMATS[kind].optional
        if not needed <= set(fields) <= possible:
            optional = ", ".join(sorted(FORMATS[kind].optional)) or "none"
            raise UserError(
                f"{self.path}: metadata.fields of the format {kind} are "
                f"{', '.join(sorted(needed))} (and perhaps {optional}), got {', '.join(fields)}"
            )
        return dict(fields)

    def _window(self) -> tuple[date, date] | None:
        window = self._take("metadata.window", list, None)
        if window is None:
            return None
        if len(window) != 2 or not all(type(day) is date for day in window):
            raise UserError(f"{self.path}: metadata.window must be two days, YYYY-MM-DD each")
        return window[0], window[1]

    def _copy(self) -> Copy | None:
        if self._take("metadata.copy", dict, None) is None:
            return None
        return Copy(self._take("metadata.copy.url", str), self._take("metadata.copy.sha256", str))
