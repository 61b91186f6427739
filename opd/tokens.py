"""Compare student and teachers at every sampled token: the one place where logits are made.

A student's logits over a vocabulary of 150,000 are the largest thing of a step. So they exist for a
tile of n tokens at a time: a tile's log-probabilities, its loss, the gradient of that loss and the
metrics are all taken before the next tile is begun, and what is kept of it are [n] numbers and the
gradients of hidden states and head. Backward only passes those on. This makes four products with
heads: the teacher's, the student's, and two for its gradient; logits that were thrown away and made
once more in backward would need six.

A tile has two arrays, the student's and the teacher's logits (and the reference's, where the loss
has one), in memory that all tiles share; the gradient takes the place of the student's. All else is
done for a few rows at a time, whose numbers a processor keeps at hand: on a CPU that is much faster
than whole tiles, one operation after the other.

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
from transformers import PreTrainedModel

from opd.models.passes import Buffer, Head, body, product_dtype
from opd.objectives import Distributions, Objective
from opd.rollouts import Rollouts, Tokens
from opd.sharding import forward_pass
from opd.teachers.teacher import Opened, Opinion

# Numbers of an [n, V] array where nobody says otherwise: 16 MiB in float32; a GPU wants larger
# products. But a tile must not be so small that to read the head takes longer than to multiply.
TILE_NUMBERS = {"cpu": 2**22, "cuda": 2**26}
LEAST_SHARE = 1 / 8  # of the numbers of the head
ROWS_NUMBERS = {"cpu": 2**18}  # of what is worked on at a time: all of a tile on a GPU

# What student and teachers think of n tokens, and what else is known of them -> {name: [n]}
Measure = Callable[[Distributions, Tokens], Mapping[str, Tensor]]


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
        tile: Tokens per tile; None: as many as have 2**22 logits on a CPU, 2**26 on a GPU, or an
            eighth of the numbers of the head if that is more.
    """
    with ExitStack() as stack:
        opened = {name: stack.enter_context(o.opened()) for name, o in opinions.items()}
        tiles = _Tiles(opened, objective, measure, Tokens.of(micro), temperature, tile)
        total = _student_pass(student, *micro.inputs(), run=tiles.run, size=vocabulary)
        return Compared(total, tiles.joined())


def tile_size(width: int, vocabulary: int, device: str) -> int:
    """Return how many tokens a tile has where nobody says: see :data:`TILE_NUMBERS`.

    Args:
        width: H, of the head.
        vocabulary: V, of the head.
        device: Its type.
    """
    least = int(width * LEAST_SHARE)
    return max(TILE_NUMBERS.get(device, 2**26) // vocabulary, least, 1)


@torch.no_grad()
def teacher_logprobs(opinion: Opinion, y: Tensor, *, tile: int) -> Tensor:
    """Let a teacher say log q(y) of N sampled tokens, tile by tile; all ranks together.

    Args:
        opinion: What it thinks of them.
        y: The tokens, [N].
        tile: Tokens per tile.

    Returns:
        [N].
    """
    found = []
    with opinion.opened() as opened:
        for rows in _cut(len(y), tile):
            theirs = opened(rows)
            if theirs.ndim == 2:
                theirs = theirs.log_softmax(dim=-1).gather(1, y[rows, None]).squeeze(1)
            found.append(theirs)
    return torch.cat(found)


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
    hidden, dtype = body(student, ids, mask, predicts), product_dtype(student)
    with torch.autocast(hidden.device.type, enabled=False):
        return run(Head.of(student, size, dtype), hidden.float())


class _Tiles:
    """The tiles of one micro-batch, and what has been found out about them."""

    def __init__(
        self,
        opened: Mapping[str, Opened],
        objective: Objective | None,
        measure: Measure,
        tokens: Tokens,
        temperature: float,
        tile: int | None,
    ) -> None:
        self.opened = opened
        self.objective = objective
        self.measure = measure
        self.tokens = tokens
        self.temperature = temperature
        self.tile = tile
        self.values: dict[str, list[Tensor]] = {}

    def run(self, head: Head, hidden: Tensor) -> Tensor:
        """Go through all tiles; returns the sum of the loss."""
        if self.objective is not None and torch.is_grad_enabled():
            total: Tensor = _GradientInForward.apply(hidden, head.weight, head.bias, self, head)
            return total
        with torch.no_grad():
            losses = [loss for _, _, loss in self.each(head, hidden, gradient=False)]
        return torch.stack(losses).sum()

    def each(
        self, head: Head, hidden: Tensor, *, gradient: bool
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Go through the tiles.

        Args:
            head: The student's.
            hidden: Its hidden states, [N, H].
            gradient: Whether to take that of the loss.

        Yields:
            Which tokens a tile has; the gradient by the products with the head, [n, V], until the
            next tile is begun, if it is wanted; the sum of the loss.
        """
        size, device = len(head.weight), hidden.device.type
        tile = self.tile or tile_size(head.weight.shape[1], size, device)
        few = max(ROWS_NUMBERS[device] // size, 1) if device in ROWS_NUMBERS else tile
        buffer = Buffer()
        for rows in _cut(len(hidden), tile):
            product = head.product(hidden[rows], buffer.of(hidden[rows], size))
            opinions = {name: opened(rows) for name, opened in self.opened.items()}
            tokens, total = self.tokens[rows], hidden.new_zeros(())
            for some in _cut(len(product), few):
                of_some = {name: opinion[some] for name, opinion in opinions.items()}
                loss, slope = self.judge(head.finish(product[some]), of_some, tokens[some])
                if gradient and slope is not None:
                    head.slope(product[some], slope, self.temperature)
                total += loss
            yield rows, product, total

    def judge(
        self, logits: Tensor, opinions: Mapping[str, Tensor], tokens: Tokens
    ) -> tuple[Tensor, Tensor | None]:
        """Note the values of some tokens; returns their summed loss, and its slope, [n, V]."""
        if self.temperature != 1:
            logits = logits / self.temperature
        both = Distributions(
            logits.log_softmax(dim=-1),
            {
                name: opinion if opinion.ndim == 1 else opinion.log_softmax(dim=-1)
                for name, opinion in opinions.items()
            },
        )
        self._note(self.measure(both, tokens))
        if self.objective is None:
            return logits.new_zeros(()), None
        loss, slope = self.objective.with_slope(both, tokens)
        if tokens.weight is not None:
            loss, slope = loss * tokens.weight, slope * tokens.weight[:, None]
        self._note({"opd/loss": loss, **self.objective.measure(both, tokens)})
        return loss.sum(), slope

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
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tiles: _Tiles, head: Head
    ) -> Tensor:
        for_hidden, for_weight, for_bias = (
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        total = hidden.new_zeros(())
        for rows, gradient, loss in tiles.each(head, hidden, gradient=True):
            total += loss
            if for_hidden is not None:
                head.by_hidden(gradient, out=for_hidden[rows])
            if for_weight is not None:
                head.add_by_weight(gradient, hidden[rows], for_weight)
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
        return *scaled, None, None


def _cut(length: int, tile: int) -> Iterator[slice]:
    """Cut ``length`` tokens into tiles; at least one, which may be empty."""
    for start in range(0, max(length, 1), tile):
        yield slice(start, min(start + tile, length))
