"""SNOO (arXiv 2510.15830): every k steps, a step of Nesterov's momentum from where one was.

In a configuration::

    trainer:
      callbacks+:
        class_path: callbacks.SNOO
        init_args: {k: 4, learning_rate: 0.7, momentum: 0.5}

A comparison for EffOPD: without a score, W - anchor is prolonged by what it has in common with its
predecessors. It is DiLoCo's outer optimizer (2311.08105) for a single worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.accelerator import Accelerator
from opd.errors import UserError
from opd.extrapolation import copy_weights
from opd.linear import move_to
from opd.weights import Device
from opd.world import World


class SNOO(Accelerator):
    """After each k-th step, SGD with Nesterov's momentum on the slow weights; the fast follow.

    The slow weights are the anchor, their momentum stands beside it: two tensors per weight. The
    optimizer's own state is kept. In between the run is judged by, and saves, the fast weights:
    validate at multiples of k.

    Args:
        k: Steps between two outer steps.
        learning_rate: Of the outer step, above 0. With 1 and no momentum nothing happens. The
            default is DiLoCo's, that of the momentum ours: 0.9 is meant for long runs.
        momentum: From 0, below 1. With 0 it is Lookahead, learning_rate its alpha.
        parameters: all, attention_and_mlp, or glob patterns.
        anchor_device: Where slow weights and momentum live: parameters (beside the fast ones), or
            cpu.
    """

    label: ClassVar[str] = "snoo"

    def __init__(
        self,
        k: int = 20,
        learning_rate: float = 0.7,
        momentum: float = 0.5,
        parameters: str | list[str] = "all",
        anchor_device: Device = "parameters",
    ) -> None:
        if k < 1 or not 0 < learning_rate < float("inf") or not 0 <= momentum < 1:
            raise UserError(
                f"SNOO(k={k}, learning_rate={learning_rate}, momentum={momentum}): k must be at "
                "least 1, learning_rate above 0, momentum from 0 and below 1"
            )
        super().__init__(parameters, anchor_device, beside=["momentum"])
        self.k = k
        self.learning_rate = learning_rate
        self.momentum = momentum

    def due(self, t: int) -> bool:
        return t % self.k == 0

    def accelerate(
        self, trainer: Trainer, pl_module: LightningModule, output: Any
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Take an outer step."""
        slow = self.anchor.shards(self.names)
        buffers = self.companions["momentum"].shards(self.names)
        reduce_sum = self.weights.over_shards(World(trainer.strategy))
        with self.weights.edit(self.names) as fast:
            targets = outer_step(slow, fast, buffers, self.learning_rate, self.momentum)
            move = move_to(fast, slow, targets, reduce_sum)
            copy_weights(slow, fast)
        return {"coefficient": move.coefficient}, move.metrics()


@torch.no_grad()
def outer_step(
    slow: Sequence[Tensor],
    fast: Sequence[Tensor],
    buffers: Sequence[Tensor],
    learning_rate: float,
    momentum: float,
) -> Iterator[Tensor]:
    """Yield new slow weights, and update their momentum (2510.15830, algorithm 1).

    s = w - w~, the pseudo-gradient; b = mu b + s; w = w - eta (mu b + s): torch's SGD with
    ``nesterov``. Tensors may be shards.

    Args:
        slow: w, on any device.
        fast: w~, where the inner optimizer has come.
        buffers: b, beside the slow weights; updated.
        learning_rate: eta.
        momentum: mu.
    """
    for w, inner, b in zip(slow, fast, buffers, strict=True):
        s = w - inner.to(w.device)
        b.mul_(momentum).add_(s)
        yield w.sub(s.add_(b, alpha=momentum), alpha=learning_rate).to(inner.device)
