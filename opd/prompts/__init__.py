"""Prompts: a hub data set, a JSONL or parquet file or ``embedded:NAME`` becomes token ids.

A row holds ``prompt`` (text or a chat) or ``messages`` (a chat), and may hold ``answer`` and
``teacher``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opd.prompts.format import PromptFormat, encode, pad_token_id, tokenize_rows
from opd.prompts.prompt import Prompt, PromptBatch
from opd.prompts.sources import Row, read_rows

if TYPE_CHECKING:
    from opd.prompts.datamodule import PromptDataModule, PromptLoader

__all__ = [
    "Prompt",
    "PromptBatch",
    "PromptDataModule",
    "PromptFormat",
    "PromptLoader",
    "Row",
    "encode",
    "pad_token_id",
    "read_rows",
    "tokenize_rows",
]


def __getattr__(name: str) -> Any:
    """Load the data module, and Lightning with it, for those who train."""
    if name in ("PromptDataModule", "PromptLoader"):
        from opd.prompts import datamodule

        return getattr(datamodule, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
