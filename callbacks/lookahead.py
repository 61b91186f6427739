"""Lookahead (arXiv 1907.08610): every k steps, go back a part of the way to where one was.

In a configuration::

    trainer:
      callbacks+:
        class_path: callbacks.Lookahead
        init_args: {k: 5, alpha: 0.5}

A comparison for EffOPD, which it is the opposite of: both look at W - anchor; EffOPD goes on
along it as far as a score says, Lookahead always goes back by the same part.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer

from callbacks.accelerator import Accelerator
from opd.errors import UserError
from opd.extrapolation import direction_norm
from opd.weights import Device
from opd.world import World


class Lookahead(Accelerator):
    """After each k-th step: slow += alpha (fast - slow), and fast = slow (1907.08610, algorithm 1).

    The fast weights are those that the optimizer moves, its state is kept, and the slow ones are
    the anchor. In between the run is judged by, and saves, the fast weights, not the slow ones as
    in the paper: validate at multiples of k.

    Args:
        k: Steps between two moves.
        alpha: Part of the way from the slow to the fast weights, above 0 and below 1.
        parameters: all, attention_and_mlp, or glob patterns.
        anchor_device: Where the slow weights live: parameters (beside the fast ones), or cpu.
    """

    label: ClassVar[str] = "lookahead"

    def __init__(
        self,
        k: int = 5,
        alpha: float = 0.5,
        parameters: str | list[str] = "all",
        anchor_device: Device = "parameters",
    ) -> None:
        if k < 1 or not 0 < alpha < 1:
            raise UserError(
                f"Lookahead(k={k}, alpha={alpha}): k must be at least 1, alpha between 0 and 1"
            )
        super().__init__(parameters, anchor_device)
        self.k = k
        self.alpha = alpha

    def due(self, t: int) -> bool:
        return t % self.k == 0

    def accelerate(
        self, trainer: Trainer, pl_module: LightningModule, output: Any
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Move both; in EffOPD's terms to W + c (W - anchor) with c = alpha - 1."""
        slow = self.anchor.shards(self.names)
        over_shards = self.weights.over_shards(World(trainer.strategy))
        norm = direction_norm(self.weights.shards(self.names), slow, over_shards)
        with self.weights.edit(self.names) as fast:
            for f, s in zip(fast, slow, strict=True):
                s.lerp_(f.to(s.device), self.alpha)
                f.copy_(s)
        coefficient = self.alpha - 1
        return {"coefficient": coefficient}, {"coefficient": coefficient, "direction_norm": norm}
