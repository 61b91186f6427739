"""What accelerators share that look at the weights after some steps, and move them once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from callbacks.accelerator import Accelerator
from opd.errors import UserError
from opd.weights import Device

log = logging.getLogger(__name__)


class Once(Accelerator):
    """Acts after each of some steps: looks, and after the last one, moves the weights.

    There, ``history`` gets an entry each time; of the last alone it has a ``coefficient``. When all
    is done, the tensors beside the weights are let go. A run that ends before moves nothing, and a
    line says so.

    Args:
        steps: Those steps, ascending.
        parameters: As of Accelerator.
        anchor_device: As of Accelerator.
        beside: As of Accelerator.
    """

    def __init__(
        self,
        steps: Sequence[int],
        parameters: str | list[str],
        anchor_device: Device,
        beside: Sequence[str] = (),
    ) -> None:
        super().__init__(parameters, anchor_device, beside)
        self.steps = list(steps)

    @property
    def observed(self) -> list[int]:
        """The steps after which it has looked."""
        return [entry["step"] for entry in self.history]

    def due(self, t: int) -> bool:
        return t in self.steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where a checkpoint was.

        Raises:
            UserError: The last of its steps is over, or the checkpoint's were others.
        """
        super().on_train_start(trainer, pl_module)
        name, t = type(self).__name__, trainer.global_step
        expected = [s for s in self.steps if self.observed and self.observed[0] <= s <= t]
        if self.observed != expected:
            raise UserError(
                f"{name}: the checkpoint's run has looked at the weights after steps "
                f"{self.observed}, this one would have after {expected}; resume with the same "
                "options"
            )
        if t >= self.steps[-1] and not (self.history and "coefficient" in self.history[-1]):
            raise UserError(
                f"{name}: moves the weights after step {self.steps[-1]}, and the run goes on from "
                f"step {t}; choose a later one"
            )
        if self._is_too_short(trainer):
            self._say_that_nothing_moves(trainer, f"trainer.max_steps={trainer.max_steps}")
        self.let_go(t)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        t = trainer.global_step
        if t < self.steps[-1] and not self._is_too_short(trainer):
            self._say_that_nothing_moves(trainer, f"the run has ended after step {t}")

    def _is_too_short(self, trainer: Trainer) -> bool:
        return 0 <= trainer.max_steps < self.steps[-1]

    def _say_that_nothing_moves(self, trainer: Trainer, why: str) -> None:
        if trainer.is_global_zero:
            log.warning(
                "%s moves the weights after step %d, and %s: so far it has moved nothing",
                *(type(self).__name__, self.steps[-1], why),
            )

    def let_go(self, t: int) -> None:
        """Free the tensors beside the weights if step t was the last of its steps."""
        if t >= self.steps[-1]:
            for companion in self.companions.values():
                companion.replace({})


def evenly(owner: str, every: int, at: int) -> range:
    """Return the steps every, 2 every, ..., at.

    Raises:
        UserError: There are fewer than two, or ``at`` is none of them.
    """
    if every < 1 or at < 2 * every or at % every:
        raise UserError(
            f"{owner}(every={every}, at={at}): every must be at least 1, and at a multiple of it, "
            "twice as much at least"
        )
    return range(every, at + 1, every)
