"""RELEX (arXiv 2605.21468): a line through what has been seen of each tensor, followed to a step.

In a configuration::

    trainer:
      callbacks+:
        class_path: callbacks.RELEX
        init_args: {every: 2, at: 8, target: 16}

Of each tensor's displacements the first direction is kept, which leaves noise behind; how far the
weights have come along it is regressed on the step. No score: a comparison for EffOPD, which asks
one how far to go. The maths stands in ``opd/linear.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.once import Once, evenly
from opd import linear
from opd.errors import UserError
from opd.weights import Device
from opd.world import World

log = logging.getLogger(__name__)


class RELEX(Once):
    """After step ``at``, once: W = W_0 + c(T) v in every tensor, T the target.

    v is the first right singular vector of the displacements dW_t = W_t - W_0 that it has seen, as
    rows; c(t) the least-squares line, with an intercept, of their coefficients on t. As published:
    displacements are not centred, and W_0 itself is no observation. Ours: that it is done within a
    run, which goes on from there, as step ``at`` + 1 and with the optimizer's state as it was; and
    which steps are seen.

    It takes at / every copies of the weights until it is done: two at least.

    Args:
        every: Steps between two observations.
        at: The last one, a multiple of ``every``.
        target: T, a later step.
        parameters: all, attention_and_mlp, or glob patterns.
        anchor_device: Where W_0 and displacements live: parameters (beside W), or cpu.
    """

    label: ClassVar[str] = "relex"

    def __init__(
        self,
        at: int,
        target: int,
        every: int = 1,
        parameters: str | list[str] = "all",
        anchor_device: Device = "parameters",
    ) -> None:
        steps = evenly("RELEX", every, at)
        if target <= at:
            raise UserError(f"RELEX.target={target} must lie beyond at={at}")
        slots = [f"displacement_{i}" for i in range(len(steps) - 1)]  # of the last, W itself
        super().__init__(steps, parameters, anchor_device, beside=slots)
        self.at = at
        self.target = target

    def accelerate(
        self, trainer: Trainer, pl_module: LightningModule, output: Any
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Remember dW_t, or follow the line."""
        anchor, seen = self.anchor.shards(self.names), len(self.observed)
        if trainer.global_step < self.at:
            kept = self.companions[f"displacement_{seen}"].shards(self.names)
            for d, w, a in zip(kept, self.weights.shards(self.names), anchor, strict=True):
                d.copy_(w.to(a.device) - a)
            return {}, {}
        earlier = [self.companions[f"displacement_{i}"].shards(self.names) for i in range(seen)]
        world = World(trainer.strategy)
        if not seen:
            if not world.rank:
                log.warning("RELEX: nothing was seen before step %d, so there is no line", self.at)
            self.let_go(self.at)
            return {"coefficient": 0.0}, {"coefficient": 0.0}
        reduce_sum = self.weights.over_shards(world)
        with self.weights.edit(self.names) as weights:
            rows = displacements(weights, anchor, earlier)
            grams = reduce_sum(torch.stack([linear.gram(each) for each in rows]))
            beta, share = linear.rank_one_line(grams, [*self.observed, self.at], self.target)
            rows = displacements(weights, anchor, earlier)
            targets = (
                linear.combine(a, each, betas)
                for betas, each, a in zip(beta.tolist(), rows, anchor, strict=True)
            )
            move = linear.move_to(weights, anchor, targets, reduce_sum)
        self.let_go(self.at)
        return {"coefficient": move.coefficient}, {**move.metrics(), "rank_one_share": share}


def displacements(
    weights: Sequence[Tensor], anchor: Sequence[Tensor], earlier: Sequence[Sequence[Tensor]]
) -> Iterator[list[Tensor]]:
    """Yield the displacements of one tensor after the other, the last one W - anchor."""
    for i, (w, a) in enumerate(zip(weights, anchor, strict=True)):
        yield [*(kept[i].to(w.device) for kept in earlier), w - a.to(w.device)]
