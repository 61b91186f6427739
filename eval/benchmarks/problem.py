"""What all formats share: a problem, a row of a data set, and the text that the user says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]  # our names of fields -> values of a row
Doc = dict[str, str | None]  # what lm-eval calls a doc

_PLACE = re.compile(r"\{(problem|options|examples|starter)\}")


class LeftOut(Exception):  # noqa: N818 - no error: a row that is no problem
    """A row that cannot be a problem of its benchmark, and why; such rows are counted."""


def render(template: str, **fields: str) -> str:
    """Put fields into a prompt, in one pass: braces of a problem are its own."""
    return _PLACE.sub(lambda place: fields[place[1]], template)
