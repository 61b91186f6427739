"""Compare student and teachers at every sampled token: the one place where logits are made.

A student's logits over a vocabulary of 150,000 are the largest thing of a step. So they exist for a
tile of n tokens at a time: a tile's log-probabilities, its loss, the gradient of that loss and the
metrics are all taken before the next tile is begun, and what is kept of it are [n] numbers and the
gradients of hidden states and head. Backward only passes those on. This makes four products with
heads: the teacher's, the student's, and two for its gradient; logits that were thrown away and made
once more in backward would need six.

Shapes: N tokens of a micro-batch, n of a tile, H hidden size, V vocabulary. Symbols as in the paper
(arXiv 2605.11739): p = student, q = teacher, mu = rollout engine, y = the token sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from opd.models.passes import Head, body
from opd.objectives import Objective, as_needed
from opd.rollouts import Rollouts, Tokens
from opd.sharding import forward_pass
from opd.teachers.teacher import Opened, Opinion

# Numbers of an [n, V] array where nobody says otherwise: 16 MiB in float32, which a CPU's memory
# allocator reuses; a GPU wants larger products.
TILE_NUMBERS = {"cpu": 2**22, "cuda": 2**26}

# (log_p [n, V], opinions {name: [n, V] or [n]}, tokens of n) -> {name: [n]}, without gradient
Measure = Callable[[Tensor, Mapping[str, Tensor], Tokens], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Compared:
    """What student and teachers think of a micro-batch.

    Attributes:
        total: Sum of the loss over tokens, a scalar with gradient; 0 without an objective.
        values: By name of the measure, and the objective's ``opd/loss``; each [N], no gradient.
    """

    total: Tensor
    values: dict[str, Tensor]


def compare(
    student: PreTrainedModel,
    micro: Rollouts,
    opinions: Mapping[str, Opinion],
    objective: Objective | None,
    measure: Measure,
    *,
    vocabulary: int,
    temperature: float,
    tile: int | None = None,
) -> Compared:
    """Run the student over a micro-batch, and compare it with its teachers token by token.

    One pass of the student; teachers have been read before, and are opened once. The gradient of
    ``total`` can be taken once.

    Args:
        student: The student, whole or sharded.
        micro: The micro-batch, N tokens.
        opinions: What teachers think of it, by the names that the objective and the measure use.
        objective: Loss per token; None: no loss, and no gradient.
        measure: What else is wanted of every token.
        vocabulary: Tokens beyond so many are left out: padding of the larger vocabulary.
        temperature: Divides the student's logits.
        tile: Tokens per tile; None: as many as have 2**22 logits on a CPU, 2**26 on a GPU.
    """
    tile = tile or max(TILE_NUMBERS.get(micro.lengths.device.type, 2**26) // vocabulary, 1)
    with ExitStack() as stack:
        opened = {name: stack.enter_context(o.opened()) for name, o in opinions.items()}
        tiles = _Tiles(opened, objective, measure, Tokens.of(micro), temperature)
        total = _student_pass(
            student, *micro.inputs(), run=lambda head, h: tiles.run(head, h, tile), size=vocabulary
        )
        return Compared(total, tiles.joined())


@forward_pass
def _student_pass(
    student: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    predicts: Tensor,
    *,
    run: Callable[[Head, Tensor], Tensor],
    size: int,
) -> Tensor:
    hidden = body(student, ids, mask, predicts)
    with torch.autocast(hidden.device.type, enabled=False):
        return run(Head.of(student, size), hidden.float())


class _Tiles:
    """The tiles of one micro-batch, and what has been found out about them."""

    def __init__(
        self,
        opened: Mapping[str, Opened],
        objective: Objective | None,
        measure: Measure,
        tokens: Tokens,
        temperature: float,
    ) -> None:
        self.opened = opened
        self.objective = objective
        self.measure = measure
        self.tokens = tokens
        self.temperature = temperature
        self.values: dict[str, list[Tensor]] = {}

    def run(self, head: Head, hidden: Tensor, tile: int) -> Tensor:
        """Go through all tiles; returns the sum of the loss."""
        if self.objective is not None and torch.is_grad_enabled():
            total: Tensor = _GradientInForward.apply(
                hidden, head.weight, head.bias, self, head, tile
            )
            return total
        total = hidden.new_zeros(())
        for rows in _cut(len(hidden), tile):
            total += self.loss(head.product(hidden[rows]), head, rows).detach()
        return total

    def loss(self, product: Tensor, head: Head, rows: slice) -> Tensor:
        """Return the loss of one tile, summed over its tokens, and note its values."""
        log_p = torch.log_softmax(head.finish(product) / self.temperature, dim=-1)
        with torch.no_grad():
            opinions = {name: opened(rows) for name, opened in self.opened.items()}
        tokens = self.tokens[rows]
        with torch.no_grad():
            self._note(self.measure(log_p.detach(), opinions, tokens))
        if self.objective is None:
            return product.new_zeros(())
        loss = self.objective(log_p, as_needed(opinions, self.objective.needs, tokens.y), tokens)
        if tokens.weight is not None:
            loss = loss * tokens.weight
        self._note({"opd/loss": loss.detach()})
        return loss.sum()

    def _note(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def joined(self) -> dict[str, Tensor]:
        """Return the values of all tokens, [N] each."""
        return {name: torch.cat(parts) for name, parts in self.values.items()}


class _GradientInForward(torch.autograd.Function):
    """Sum of the loss over tiles; the gradients of hidden states and head are made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tiles: _Tiles,
        head: Head,
        tile: int,
    ) -> Tensor:
        for_hidden, for_weight, for_bias = (
            torch.zeros_like(tensor) if tensor is not None and needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        total = hidden.new_zeros(())
        for rows in _cut(len(hidden), tile):
            product = F.linear(hidden[rows], weight, bias)
            with torch.enable_grad():
                loss = tiles.loss(product.requires_grad_(), head, rows)
            (gradient,) = torch.autograd.grad(loss, product)  # [n, V]
            total += loss.detach()
            if for_hidden is not None:
                torch.mm(gradient, weight, out=for_hidden[rows])
            if for_weight is not None:
                for_weight.addmm_(gradient.T, hidden[rows])
            if for_bias is not None:
                for_bias += gradient.sum(dim=0)
        ctx.gradients = (for_hidden, for_weight, for_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Scale what is there, in place: nothing of the size of a head is made twice."""
        (factor,) = gradients
        assert ctx.gradients is not None, "the gradient of a comparison is taken once"
        found, ctx.gradients = ctx.gradients, None
        scaled = [None if gradient is None else gradient.mul_(factor) for gradient in found]
        return *scaled, None, None, None


def _cut(length: int, tile: int) -> Iterator[slice]:
    """Cut ``length`` tokens into tiles; at least one, which may be empty."""
    for start in range(0, max(length, 1), tile):
        yield slice(start, min(start + tile, length))
