"""Prompts: a hub data set, a JSONL or parquet file or ``embedded:NAME`` becomes token ids.

A row holds ``prompt`` (text or a chat) or ``messages`` (a chat), and may hold ``answer`` and
``teacher``.
"""

from opd.prompts.datamodule import PromptDataModule, PromptLoader
from opd.prompts.format import PromptFormat, encode, pad_token_id, tokenize_rows
from opd.prompts.prompt import Prompt, PromptBatch
from opd.prompts.sources import Row, read_rows

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
