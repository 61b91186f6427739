"""Where prompts come from: a hub data set, a JSONL or parquet file, or ``embedded:NAME``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from opd.embedded import arithmetic
from opd.errors import UserError
from opd.models import hub

Row = Mapping[str, Any]
MAX_DIGITS = 4300  # of a number that Python reads


def read_rows(
    source: str, split: str, *, name: str | None = None, revision: str | None = None
) -> tuple[Sequence[Row], str]:
    """Read all rows of a prompt source; those of a hub data set stay on disk until they are needed.

    Args:
        source: ``embedded:train``, ``embedded:test``, a .jsonl or .parquet file, a hub id, or a
            folder with a data set as the hub has it.
        split: Split of a data set of the hub; ignored elsewhere, as are the next two.
        name: Which of its configurations. None: its only one, or its default.
        revision: Branch, tag or commit of it. None: the newest.

    Returns:
        The rows, and what one row is called in messages (``line`` or ``row``).

    Raises:
        UserError: The source does not exist, cannot be parsed, or holds no rows.
    """
    embedded = source.removeprefix("embedded:")
    unit = "row"
    if source != embedded:
        if embedded not in arithmetic.PROMPTS:
            known = ", ".join(f"embedded:{known}" for known in arithmetic.PROMPTS)
            raise UserError(f"{source}: the embedded prompts are {known}")
        rows: Sequence[Row] = list(arithmetic.rows(embedded))
    elif is_of_the_hub(source):
        rows = _read_hub(source, split, name, revision)
    elif source.endswith(".parquet"):
        rows = _read_parquet(_path(source))
    else:
        rows, unit = _read_jsonl(_path(source)), "line"
    if not len(rows):
        raise UserError(f"{source}: holds no prompts")
    return rows, unit


def choose(rows: Sequence[Row], numbers: Sequence[int]) -> Sequence[Row]:
    """Return some rows; those of a hub data set stay on disk."""
    import datasets

    if isinstance(rows, datasets.Dataset):
        return cast(Sequence[Row], rows.select(numbers))
    return [rows[number] for number in numbers]


def columns(rows: Sequence[Row], fields: Iterable[str]) -> Sequence[Row]:
    """Leave out columns of a hub data set that hold none of these fields: they may be large."""
    import datasets

    if not isinstance(rows, datasets.Dataset):
        return rows
    needed = {name for field in fields for name in (field, field.split(".")[0])}
    return cast(Sequence[Row], rows.select_columns(sorted(needed & set(rows.column_names))))


def is_of_the_hub(source: str) -> bool:
    """Whether the datasets library reads a source, from the hub or a folder: neither file nor ours.

    Only these have splits, configurations and revisions.
    """
    file = source.endswith((".jsonl", ".json", ".parquet")) and not Path(source).is_dir()
    return not file and not source.startswith("embedded:")


def _path(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError as error:  # ~somebody
        raise UserError(f"{source}: {error}") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        where = f"{path} line {number}"
        if not line.strip():
            if not text.strip():
                break
            raise UserError(f"{where}: is empty; remove it")
        row = _parse(line, where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, got {line[:60]!r}")
        rows.append(row)
    return rows


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        hint = "; write one JSON object a line" if line.lstrip().startswith("[") else ""
        raise UserError(f"{where}: not valid JSON ({error}){hint}") from error
    except RecursionError as error:
        raise UserError(f"{where}: is nested too deeply") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object, which may not have a key twice: readers differ in which one counts."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"has {twice!r} twice; keep one")
    return row


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise UserError(f"has a number of {len(digits)} digits; write it as text, in quotes")
    return int(digits)


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    unreadable = (pyarrow.ArrowException, OSError, ValueError, TypeError, OverflowError)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except unreadable as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as parquet ({reason})") from error
    columns = {}
    for column in table.column_names:
        if table.column_names.count(column) > 1:
            raise UserError(f"{path}: has column {column!r} twice; keep one")
        try:
            columns[column] = table[column].to_pylist()
        except unreadable as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: column {column!r} cannot be read ({reason})") from error
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _read_hub(source: str, split: str, name: str | None, revision: str | None) -> Sequence[Row]:
    import datasets

    path = _path(source)
    if path.is_file() or (not path.exists() and source.startswith((".", "/", "~"))):
        raise UserError(f"{source}: prompts come from a .jsonl or .parquet file or a hub id")
    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        raise UserError(
            f"{source}: was written by save_to_disk; write prompts with Dataset.to_parquet, and "
            "name that file"
        )
    source = str(path) if path.is_dir() else source
    silent = None if path.is_dir() else hub.unreachable(source, revision, "dataset")
    try:
        with cache_only() if silent else nullcontext():
            loaded = datasets.load_dataset(source, name, split=split, revision=revision)
            return cast(Sequence[Row], loaded)
    except Exception as error:  # the hub client raises dozens of unrelated types
        if silent is None and (there_is := _available(source, split, name, revision)):
            raise UserError(f"{source}: {there_is}") from error
        reason = silent or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"{source}: neither a .jsonl or .parquet file nor a data set on the hub with "
            f"split {split!r} ({reason})"
        ) from error


@contextmanager
def cache_only() -> Iterator[None]:
    """Keep the hub's clients from asking it over and over when it does not answer."""
    import datasets.config
    import huggingface_hub.constants

    places = [huggingface_hub.constants, datasets.config]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = was


def _available(source: str, split: str, name: str | None, revision: str | None) -> str | None:
    """Say which configurations or splits there are instead, if that is what is wrong."""
    import datasets

    try:
        names = datasets.get_dataset_config_names(source, revision=revision)
        if (name or names[0]) not in names or (name is None and len(names) > 1):
            default = datasets.get_dataset_default_config_name(source, revision=revision)
            if name is not None or default is None:
                wrong = f"there is no {name!r} among" if name else "choose with data.name one of"
                return f"{wrong} its configurations {names}"
            name = default
        splits = datasets.get_dataset_split_names(source, name or names[0], revision=revision)
        if split.partition("[")[0] not in splits:
            return (
                f"there is no {split!r} among its splits {splits}; choose with data.train_split "
                "and data.validation_split"
            )
    except Exception:  # no contact, no such data set: the first error says it
        return None
    return None
