"""ModelCheckpoint that loses nothing: also when a run ends, is told to stop, or fails."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from opd.checkpoints import newest_checkpoint
from opd.errors import NonFiniteError, UserError


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, and a checkpoint after the last step, whatever ends the run.

    SIGTERM or SIGUSR1 on any rank ends the step, saves, and stops all ranks. (Lightning's own
    handlers do not save, or save in the middle of a step, and call collectives wherever the signal
    has met them, which can hang a sharded run.)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told_to_stop = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_to_stop(trainer):  # there is nothing to save yet
            raise SIGTERMException

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._listen()

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):  # what clusters send ahead of the end
                signal.signal(number, self._stop)  # Lightning restores the old ones afterwards

    def _is_to_stop(self, trainer: Trainer) -> bool:
        """Whether any rank has been told to; a collective."""
        return trainer.strategy.reduce_boolean_decision(self._told_to_stop, all=False)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._told_to_stop = True

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._is_to_stop(trainer):
            self._save_now(trainer)
            trainer._signal_connector.received_sigterm = True  # stops once the step is logged

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, NonFiniteError):  # all ranks have it, and W is untouched
            self._save_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_now(trainer)
        super().on_train_end(trainer, pl_module)

    def _save_now(self, trainer: Trainer) -> None:
        """Save this step, unless it has been."""
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save.

        Raises:
            UserError: The checkpoint cannot be written; earlier ones are untouched.
        """
        try:
            super()._save_checkpoint(trainer, filepath)
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            left = newest_checkpoint(Path(filepath).parent) or "none"
            raise UserError(
                f"{filepath}: cannot be written ({reason}); the last whole checkpoint is {left}"
            ) from error
