"""Prompts as token ids: one, and a batch of them.

Shapes: B prompts, P tokens of the longest, padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt, rendered and tokenized.

    Attributes:
        row: Number of its row, from 0, counted over all data sets that are trained on, or validated
            on, together.
        token_ids: Token ids, special tokens included.
        answer: Reference answer, if the row has one.
        teacher: Name of the teacher that reads its completions, if the row names one.
        teacher_ids: What its teacher reads instead of ``token_ids``, if that is something else.
        completion_ids: A completion that comes with it, its EOS included, if the row has one.
        data_set: Name of the data set that the row is from, if it has one.
        where: File and row, for messages.
    """

    row: int
    token_ids: tuple[int, ...]
    answer: str | None = None
    teacher: str | None = None
    teacher_ids: tuple[int, ...] | None = None
    data_set: str | None = None
    where: str = ""
    completion_ids: tuple[int, ...] | None = None

    @property
    def place(self) -> str:
        """What to call it in messages."""
        return self.where or f"prompt row {self.row}"


@dataclass
class PromptBatch:
    """B prompts, padded on the left to P tokens.

    Attributes:
        prompts: The B prompts.
        ids: Token ids, [B, P].
        mask: True at tokens, False at padding, [B, P].
        upcoming: The prompts of the batch that follows, perhaps none on this rank; None: nobody
            knows.
    """

    prompts: list[Prompt]
    ids: Tensor
    mask: Tensor
    upcoming: Sequence[Prompt] | None = None

    @classmethod
    def collate(cls, prompts: Sequence[Prompt], pad_id: int) -> PromptBatch:
        """Pad prompts on the left with ``pad_id``."""
        width = max((len(p.token_ids) for p in prompts), default=0)
        ids = torch.full((len(prompts), width), pad_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            start = width - len(prompt.token_ids)
            ids[i, start:] = torch.tensor(prompt.token_ids)
            mask[i, start:] = True
        return cls(list(prompts), ids, mask)

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str, **kwargs: Any) -> PromptBatch:
        """Copy the tensors to a device; Lightning calls this for every batch."""
        return replace(self, ids=self.ids.to(device, **kwargs), mask=self.mask.to(device, **kwargs))

    def select(self, rows: Sequence[int]) -> PromptBatch:
        """Take some prompts, in the order given, without the padding they no longer need."""
        index = torch.as_tensor(rows, device=self.ids.device, dtype=torch.long)
        width = max((len(self.prompts[i].token_ids) for i in rows), default=0)
        start = self.ids.shape[1] - width
        return PromptBatch(
            [self.prompts[i] for i in rows], self.ids[index, start:], self.mask[index, start:]
        )

    def repeat(self, times: int) -> PromptBatch:
        """Repeat each prompt ``times`` times, copies side by side."""
        return self.select([i for i in range(len(self)) for _ in range(times)])

    def for_teacher(self, pad_id: int) -> PromptBatch:
        """Return the prompts as their teachers read them."""
        if all(prompt.teacher_ids is None for prompt in self.prompts):
            return self
        read = [
            replace(prompt, token_ids=prompt.teacher_ids or prompt.token_ids)
            for prompt in self.prompts
        ]
        return PromptBatch.collate(read, pad_id).to(self.ids.device)

    def unique(self) -> tuple[PromptBatch, Tensor]:
        """Return the U prompts that differ in their tokens, and which of them each is, [B]."""
        first: dict[tuple[int, ...], int] = {}
        of = [first.setdefault(prompt.token_ids, len(first)) for prompt in self.prompts]
        index = torch.tensor(of, device=self.ids.device, dtype=torch.long)
        if len(first) == len(self):
            return self, index
        return self.select([of.index(i) for i in range(len(first))]), index
