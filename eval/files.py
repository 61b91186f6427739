"""Write the files of a command: whole or not at all, and never over something else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from opd.errors import UserError


def make_folder(output: str) -> Path:
    """Make the folder that ``--output`` names and see that it can be written to.

    Raises:
        UserError: It cannot.
    """
    if not output.strip():
        raise UserError(f"--output {output!r}: names no folder")
    folder = Path(output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    return folder


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
