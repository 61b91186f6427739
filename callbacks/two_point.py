"""Two points and a ruler (arXiv 2601.04537): weights move linearly with the step, so go on there.

In a configuration::

    trainer:
      callbacks+:
        class_path: callbacks.TwoPoint
        init_args: {first: 4, second: 8, target: 16}

The weight extrapolation of "On the Linearity of LLMs' RLVR Training", within a run: a comparison
for EffOPD, which asks a score how far to go.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer

from callbacks.once import Once
from opd.errors import UserError
from opd.extrapolation import copy_weights
from opd.linear import move_to
from opd.weights import Device
from opd.world import World


class TwoPoint(Once):
    """After step t2, once: W = W_t1 + (W_t2 - W_t1) (T - t1) / (t2 - t1).

    In EffOPD's terms W + c (W - anchor) with c = (T - t2) / (t2 - t1). Training then goes on from
    there, as step t2 + 1, with the optimizer's state as it was.

    Args:
        first: t1, a step from 0.
        second: t2, a later one.
        target: T, a still later one.
        parameters: all, attention_and_mlp, or glob patterns.
        anchor_device: Where W_t1 lives: parameters (beside W), or cpu.
    """

    label: ClassVar[str] = "two_point"

    def __init__(
        self,
        first: int,
        second: int,
        target: int,
        parameters: str | list[str] = "all",
        anchor_device: Device = "parameters",
    ) -> None:
        if not 0 <= first < second < target:
            raise UserError(
                f"TwoPoint(first={first}, second={second}, target={target}): steps must ascend, "
                "the first from 0"
            )
        super().__init__([first, second] if first else [second], parameters, anchor_device)
        self.first = first
        self.second = second
        self.target = target

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where a checkpoint was.

        Raises:
            UserError: A checkpoint has come too late, or other steps were meant.
        """
        super().on_train_start(trainer, pl_module)
        seen = self._resumed and (not self.first or self.first in self.observed)
        if trainer.global_step > self.first and not seen:
            raise UserError(
                f"TwoPoint.first={self.first}: the run goes on from step {trainer.global_step}, "
                "without these weights; choose a later one"
            )

    def accelerate(
        self, trainer: Trainer, pl_module: LightningModule, output: Any
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Remember W_t1, or go on from W_t2."""
        anchor = self.anchor.shards(self.names)
        if trainer.global_step == self.first:
            copy_weights(anchor, self.weights.shards(self.names))
            return {}, {}
        reduce_sum = self.weights.over_shards(World(trainer.strategy))
        coefficient = (self.target - self.second) / (self.second - self.first)
        with self.weights.edit(self.names) as weights:
            targets = (
                w.lerp(a.to(w.device), -coefficient) for w, a in zip(weights, anchor, strict=True)
            )
            move = move_to(weights, anchor, targets, reduce_sum)
        self.let_go(trainer.global_step)
        return {"coefficient": coefficient}, move.metrics()
