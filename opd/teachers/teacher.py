"""What every teacher promises: it reads a micro-batch, and has an opinion of each token.

Shapes: N tokens of a micro-batch, n of a tile, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import Tensor

from opd.rollouts import Rollouts

# How much an opinion says of a token: log q(v) for every v, or log q(y) of the one sampled.
Gives = Literal["full", "sampled"]
Opened = Callable[[slice], Tensor]


class Opinion(Protocol):
    """What a teacher thinks of the tokens of a micro-batch; perhaps still on its way."""

    def opened(self) -> AbstractContextManager[Opened]:
        """Make the opinion ready to be read, tile by tile.

        Once a micro-batch and on all ranks together: it may be a collective, or wait for an answer.

        Returns:
            A context, and in it a function from rows of the N tokens to float32 numbers: where its
            teacher ``gives`` all, logits [n, V], which are log-probabilities but for a number per
            row, and may be overwritten when the function is called again; where it gives sampled
            tokens, their log-probabilities [n].
        """
        ...

    def select(self, completions: Sequence[int]) -> Opinion:
        """Keep the opinion of some completions of the micro-batch."""
        ...


class Teacher(Protocol):
    """Reads completions; deliberately no ``nn.Module``.

    Whoever holds it holds no parameters: it is in no checkpoint and no optimizer.
    """

    @property
    def gives(self) -> Gives:
        """How much its opinions say of a token."""
        ...

    @property
    def context(self) -> int | None:
        """Positions that it can read; None if nobody knows."""
        ...

    def to(self, device: torch.device) -> None:
        """Get ready to read on a device."""
        ...

    def read(self, micro: Rollouts) -> Opinion:
        """Read a micro-batch; all ranks together."""
        ...
