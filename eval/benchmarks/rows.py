"""Where rows come from: the hub, at the revision that the table names, or copies in a folder.

A folder of copies (``--data DIR``, or OPD_BENCHMARK_DATA) holds ``DIR/<task>.parquet``, ``.jsonl``,
``.csv`` or ``.arrow``, or a folder ``DIR/<task>`` with such files, which are read in the order of
their names: the split of the data set as the hub has it, with all rows and the same fields. Nothing
of a row is ever printed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from eval.benchmarks.table import Benchmark
from opd.embedded import arithmetic
from opd.errors import UserError
from opd.models import hub
from opd.prompts.sources import Row, cache_only

DATA = "OPD_BENCHMARK_DATA"
SUFFIXES = (".parquet", ".jsonl", ".csv", ".arrow")
BATCH = 16  # rows held at a time; some have megabytes of tests


def use_data(folder: str | Path | None) -> None:
    """Take all benchmarks of this process, and of those that it starts, from copies in a folder.

    Args:
        folder: The folder. None: from the hub.

    Raises:
        UserError: There is no such folder.
    """
    if folder is None:
        os.environ.pop(DATA, None)
        return
    os.environ[DATA] = str(folder)
    data_folder()


def data_folder() -> Path | None:
    """Return the folder with copies, if one was named.

    Raises:
        UserError: There is no such folder.
    """
    given = os.environ.get(DATA, "").strip()
    if not given:
        return None
    folder = Path(os.path.expanduser(given))
    if not folder.is_dir():
        raise UserError(f"--data {given}: is no folder (or {DATA}, which says the same)")
    return folder


def layout(benchmark: Benchmark) -> str:
    """Say where a copy of a benchmark is looked for."""
    return (
        f"--data DIR, with DIR/{benchmark.task}{{{','.join(SUFFIXES)}}} or a folder of such files"
    )


def load_rows(benchmark: Benchmark, data: Path | None = None) -> Iterator[Row]:
    """Read the rows of a benchmark, one after the other.

    Args:
        benchmark: Which.
        data: Folder with copies. None: the hub.

    Raises:
        UserError: It cannot be read, a field is missing, or there are more or fewer rows.
    """
    if benchmark.source.startswith("embedded:"):
        where, rows = benchmark.source, _embedded(benchmark)
    elif data is not None:
        where, rows = _local(benchmark, data)
    else:
        where, rows = benchmark.where, _hub(benchmark)
    names = [n for v in benchmark.fields.values() for n in ([v] if isinstance(v, str) else v)]
    count = 0
    for row in rows:
        count += 1
        if missing := [name for name in names if name not in row]:
            raise UserError(
                f"{benchmark.task}: {where}, row {count}, has no field {missing[0]!r} (it has "
                f"{', '.join(map(str, row))}); take {benchmark.where}"
            )
        if count <= benchmark.rows:
            yield row
    if count != benchmark.rows:
        raise UserError(
            f"{benchmark.task}: {where} has {count} rows, and the benchmark {benchmark.rows}; take "
            f"the whole of {benchmark.where}"
        )


def _embedded(benchmark: Benchmark) -> Iterator[Row]:
    return iter(arithmetic.rows(benchmark.source.removeprefix("embedded:")))


def _local(benchmark: Benchmark, data: Path) -> tuple[str, Iterator[Row]]:
    files = [data / f"{benchmark.task}{suffix}" for suffix in SUFFIXES]
    found = [path for path in files if path.is_file()]
    folder = data / benchmark.task
    if folder.is_dir():
        found.append(folder)
    if not found:
        raise UserError(
            f"{benchmark.task}: there is no copy of {benchmark.where} in {data}; give "
            f"{layout(benchmark)}"
        )
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{benchmark.task}: {data} has {names}; keep one")
    paths = found
    if found[0].is_dir():
        paths = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
        if not paths:
            raise UserError(f"{benchmark.task}: {folder} is empty; give {layout(benchmark)}")
    _check_copy(benchmark, paths[0])
    return str(found[0]), (row for path in paths for row in read_file(path))


def _check_copy(benchmark: Benchmark, path: Path) -> None:
    if benchmark.copy is None or path.suffix != ".csv":
        return
    if hashlib.sha256(path.read_bytes()).hexdigest() != benchmark.copy.sha256:
        raise UserError(
            f"{path}: is not {benchmark.copy.url} (SHA-256 {benchmark.copy.sha256}); fetch it "
            "again, or give a copy of the hub's data set as .parquet or .jsonl"
        )


def read_file(path: Path) -> Iterator[Row]:
    """Read the rows of a .parquet, .arrow, .jsonl or .csv file, a few at a time.

    Raises:
        UserError: The file cannot be read.
    """
    import pyarrow

    readers = {".parquet": _parquet, ".arrow": _arrow, ".jsonl": _jsonl, ".csv": _csv}
    try:
        yield from readers[path.suffix](path)
    except (pyarrow.ArrowException, OSError, ValueError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as {path.suffix} ({_one_line(error)})") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH):
            yield from batch.to_pylist()


def _arrow(path: Path) -> Iterator[Row]:
    """Read what the datasets library caches and saves: the format of streams."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        for batch in pyarrow.ipc.open_stream(file):
            for start in range(0, batch.num_rows, BATCH):
                yield from batch.slice(start, BATCH).to_pylist()


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number}: is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number}: is no JSON object")
            yield row


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, strict=True)


def _hub(benchmark: Benchmark) -> Iterator[Row]:
    import datasets
    from huggingface_hub import hf_hub_download

    source, revision = benchmark.source, benchmark.revision
    silent = hub.unreachable(source, revision, "dataset")
    with cache_only() if silent else nullcontext(), _explained(benchmark, silent):
        if benchmark.files:
            paths = [
                hf_hub_download(source, name, repo_type="dataset", revision=revision)
                for name in benchmark.files
            ]
            rows: Any = (row for path in paths for row in read_file(Path(path)))
        else:
            rows = datasets.load_dataset(
                source, benchmark.config, split=benchmark.split, revision=revision
            )
    yield from rows


@contextmanager
def _explained(benchmark: Benchmark, silent: str | None) -> Iterator[None]:
    """Say in one line why a data set cannot be had, and what to do."""
    try:
        yield
    except Exception as error:  # the hub's clients raise dozens of unrelated types
        raise UserError(f"{benchmark.task}: {_why(benchmark, silent, error)}") from error


def _why(benchmark: Benchmark, silent: str | None, error: Exception) -> str:
    from huggingface_hub import get_token

    source, copy = benchmark.source, benchmark.copy
    if silent:
        return (
            f"{silent}, and {source} is not in the hub's cache; give a copy with "
            f"{layout(benchmark)}"
        )
    if benchmark.gated and "gated" in f"{type(error).__name__} {error}".lower():
        page = f"https://huggingface.co/datasets/{source}"
        missing = "there is no token" if get_token() is None else "the token's user has no access"
        other = f" (from {copy.url}: as DIR/{benchmark.task}.csv)" if copy else ""
        return (
            f"{source} is gated, and {missing}: accept its terms at {page}, and {hub.LOG_IN}; or "
            f"give a copy with {layout(benchmark)}{other}"
        )
    return (
        f"{benchmark.where} cannot be loaded ({type(error).__name__}: {_one_line(error)}); or give "
        f"a copy with {layout(benchmark)}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
