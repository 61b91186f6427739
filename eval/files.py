"""Files of a command: whole or not at all, or, where work must outlive a kill, line by line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opd.cli import run_folder
from opd.errors import UserError


@contextlib.contextmanager
def output_folder(output: str) -> Iterator[Path]:
    """Make the folder that ``--output`` names, for the time of a command that writes there.

    Folders that were not there before go again if the command has left nothing in them.

    Raises:
        UserError: It cannot be written to.
    """
    folder, made = run_folder.make(output)
    try:
        yield folder
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


def write_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write files; each takes its place when all of them are complete.

    Raises:
        UserError: One cannot be written; what was there before is untouched.
    """
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            data = content.encode("utf-8") if isinstance(content, str) else content
            temporary[path].write_bytes(data)
        for path, complete in temporary.items():
            os.replace(complete, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records to a file of JSON lines, in one write.

    Raises:
        UserError: It cannot be written.
    """
    lines = "".join(json.dumps(record) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell() and not _ends_a_line(path):  # what a kill has left
                file.write(b"\n")
            file.write(lines.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a file of JSON lines, but for what a kill has cut."""
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"
