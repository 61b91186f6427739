"""ModelCheckpoint that loses nothing: also when a run ends, is told to stop, or fails."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from opd import checkpoints
from opd.errors import LostServer, OutOfMemoryError, StoppedBeforeStep, UserError
from opd.prompts import PromptLoader

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # of clusters ahead of the end, of users
MEASURED_LATER = ("val/", "bench/")  # metrics that a step's weights have only after the step


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, and a checkpoint after the last step, whatever ends the run.

    Args:
        *args: ModelCheckpoint's.
        save_end: Whether the last step is saved when a run ends as planned. One that is told to
            stop, or fails, is saved all the same, so that it can go on.
        **kwargs: ModelCheckpoint's.

    ``monitor`` chooses which checkpoints are kept besides the newest; the newest is always saved,
    and ``last.ckpt`` is it. A validation metric is compared once it has been measured with the
    weights that are saved.

    SIGTERM, SIGUSR1 or Ctrl-C on any rank ends the step, saves, and stops all ranks; a second
    Ctrl-C stops at once. (Lightning's own handlers do not save, or save in the middle of a step,
    and call collectives wherever the signal has met them, which can hang a sharded run.)
    """

    def __init__(self, *args: Any, save_end: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.save_end = save_end
        self._signal: int | None = None  # what has told this rank to stop
        self._interrupted = False  # whether it was Ctrl-C, on any rank
        self._newest_step = 0  # of what has been saved; of no step there is nothing to save
        self._writing = ""
        self._missing_said = False
        self._steps_before = -1  # the batch that is being trained on

    # --- told to stop ---------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_to_stop(trainer):  # there is nothing to save yet
            raise SIGTERMException

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._listen()

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or in the background
                signal.signal(number, self._stop)  # Lightning restores the old ones afterwards

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._signal = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(2, b"\nCtrl-C: stops when this step is saved; once more: stops at once\n")

    def _is_to_stop(self, trainer: Trainer) -> bool:
        """Whether any rank has been told to; a collective."""
        decide = trainer.strategy.reduce_boolean_decision
        if not decide(self._signal is not None, all=False):
            return False
        self._interrupted = decide(self._signal == signal.SIGINT, all=False)
        return True

    # --- what goes when something newer is there ---

    @property
    def state_key(self) -> str:
        """One name, whatever the options: a run has one of these."""
        return type(self).__name__

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over which checkpoints there are, also in a folder that has been moved."""
        was, here = str(state_dict["dirpath"]), str(self.dirpath)
        moved = {key: _moved(value, was, here) for key, value in state_dict.items()}
        is_here = os.path.exists(moved["best_model_path"])
        state = moved if is_here else state_dict
        if state["monitor"] != self.monitor:  # its scores are of another metric
            state = {**state, "best_k_models": {}, "best_model_score": None}
        super().load_state_dict(state)

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Also the one that the run goes on from, if it is this run's; Lightning leaves it."""
        assert self.dirpath is not None
        place = Path(self.dirpath).absolute()
        return previous != current and place in Path(previous).absolute().parents

    # --- saving ---------------------------------------------------------------------------------

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return what a name is made of, the step too, which Lightning takes from what was logged.

        That is the last validation's: a checkpoint would bear, and take, an earlier one's name.
        """
        return super()._monitor_candidates(trainer) | {"step": torch.tensor(trainer.global_step)}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._steps_before = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        steps = self._every_n_train_steps
        if self.monitor is None or not self._is_measured_later(trainer):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif steps > 0 and trainer.global_step % steps == 0:
            self._save_as_last(trainer)
            self._defer_save_until_validation = True
        if self._is_to_stop(trainer):
            self._save_now(trainer)
            trainer._signal_connector.received_sigterm = True  # stops once the step is logged

    def _is_measured_later(self, trainer: Trainer) -> bool:
        assert self.monitor is not None
        unknown = self.monitor not in trainer.callback_metrics
        return unknown or self.monitor.startswith(MEASURED_LATER)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the monitor choose; a metric that nobody has logged chooses nothing."""
        if self.monitor is not None and self.monitor not in trainer.callback_metrics:
            if trainer.state.fn == "fit" and not trainer.sanity_checking and not self._missing_said:
                self._missing_said = True
                names = ", ".join(sorted(trainer.callback_metrics))
                log.warning("checkpoint.monitor %s has not been logged; %s", self.monitor, names)
            return
        super().on_validation_end(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        alone = isinstance(exception, OutOfMemoryError) and trainer.world_size == 1
        loader, in_step = trainer.train_dataloader, trainer.global_step == self._steps_before
        curable = alone or isinstance(exception, LostServer)  # with more memory, or a server
        if curable and in_step and isinstance(loader, PromptLoader):
            loader.put_back()  # the run that goes on takes the same step
        stopped = isinstance(exception, StoppedBeforeStep) and trainer.state.fn == "fit"
        if stopped or alone:  # all ranks have it, W is a step's
            self._save_now(trainer)
            log.warning("step %d is saved; go on with --ckpt_path last", self._newest_step)
        if isinstance(exception, SIGTERMException) and self._interrupted:
            exception.args = (signal.SIGINT,)  # tells the command line what it was

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.save_end:
            self._save_now(trainer)

    def _save_now(self, trainer: Trainer) -> None:
        """Save this step, unless it has been, whatever the monitor and save_top_k say."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # which is to leave nothing
            return
        if self.monitor is None and self._newest_step != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        self._save_as_last(trainer)

    def _save_last_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        """Make last.ckpt of this step, never of the best one of earlier."""
        if self._last_global_step_saved == trainer.global_step:
            super()._save_last_checkpoint(trainer, monitor_candidates)
        elif self.save_last:
            self._save_as_last(trainer)

    def _save_as_last(self, trainer: Trainer) -> None:
        """Save last.ckpt itself, unless the step has been; what the monitor chooses stays open."""
        if self._newest_step == trainer.global_step:
            return
        candidates = self._monitor_candidates(trainer)
        path = self.format_checkpoint_name(candidates, self.CHECKPOINT_NAME_LAST)
        chosen = self._last_global_step_saved, self._last_checkpoint_saved
        self.last_model_path = path
        self._save_checkpoint(trainer, path)
        self._last_global_step_saved, self._last_checkpoint_saved = chosen

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save.

        Raises:
            UserError: The checkpoint cannot be written; earlier ones are untouched.
        """
        assert self.dirpath is not None
        self._writing = os.path.relpath(filepath, self.dirpath)
        if trainer.is_global_zero and os.path.islink(filepath):
            os.unlink(filepath)  # to write through it would replace what it points to
        try:
            super()._save_checkpoint(trainer, filepath)
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            left = checkpoints.newest_checkpoint(Path(self.dirpath)) or "none"
            raise UserError(
                f"{filepath}: cannot be written ({reason}); the last whole checkpoint is {left}"
            ) from error
        self._newest_step = trainer.global_step

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say in the checkpoint what it is called: by that it is known as a run's own."""
        checkpoint[checkpoints.SAVED_AS] = self._writing


def _moved(value: Any, was: str, here: str) -> Any:
    """Rewrite paths into a folder that is elsewhere now, also those that are keys."""
    if isinstance(value, str) and (value == was or value.startswith(was + os.sep)):
        return here + value.removeprefix(was)
    if isinstance(value, dict):
        return {_moved(key, was, here): score for key, score in value.items()}
    return value
