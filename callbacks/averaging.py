"""Averages of the weights: one set of weights is trained, their average is judged and saved.

In a configuration::

    trainer:
      callbacks+:
        class_path: callbacks.AveragedWeights
        init_args: {decay: 0.9}

A comparison for EffOPD: an average of the past looks back where EffOPD looks ahead. (Lightning's
EMAWeightAveraging copies the whole module, teachers too, knows no shards, and a run that has ended
does not go on with the weights that it had.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer

from callbacks.accelerator import MovesWeights
from opd.errors import UserError
from opd.weights import exchanged


class AveragedWeights(MovesWeights):
    """Has the average of the weights after each step judged and saved, instead of the weights.

    Between steps the student is the average: validation, benchmarks, checkpoints and exports have
    it. The trained weights stand beside it, change places with it for each step, rollouts included,
    and are in every checkpoint, so that a run goes on bit for bit.

    Args:
        decay: Of an exponential average, between 0 and 1: average = decay average + (1 - decay) W,
            beginning with W_1. None: the mean of W_1, ..., W_t (Polyak and Juditsky, 1992).
    """

    label: ClassVar[str] = "average"

    def __init__(self, decay: float | None = 0.9) -> None:
        if decay is not None and not 0 < decay < 1:
            raise UserError(
                f"AveragedWeights(decay={decay}): decay must lie between 0 and 1, or be null, for "
                "the mean"
            )
        super().__init__()
        self.decay = decay
        self.averaged = 0  # steps
        self._module: LightningModule

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the trained weights a part of the module, beside the average.

        Raises:
            UserError: Another callback would move the weights.
        """
        super().setup(trainer, pl_module, stage)
        self._module = pl_module

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """Put the trained weights in the average's place for a step, and average if it succeeds."""
        try:
            with exchanged(self._module, self.anchor):
                self.weights.changed()
                yield
                self.averaged += 1
                share = 1 / self.averaged
                if self.decay is not None and self.averaged > 1:
                    share = 1 - self.decay
                average = self.anchor.shards(self.names)
                torch._foreach_lerp_(average, self.weights.shards(self.names), share)
        finally:
            self.weights.changed()

    def state_dict(self) -> dict[str, Any]:
        return {"averaged": self.averaged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.averaged = int(state_dict["averaged"])
