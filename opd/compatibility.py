"""What of Lightning does not go with on-policy distillation: each refused in one line.

A step samples, lets teachers read, and takes the optimizer's step itself (manual optimization), so
that callbacks and options which drive the loop, the batch or the gradient do nothing, or harm.
"""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Trainer
from lightning.pytorch import callbacks as lightning
from lightning.pytorch.callbacks.finetuning import BaseFinetuning

from opd.errors import UserError

NO_BATCH = "a step's memory is bounded by model.micro_batch_tokens, its size by data.batch_size"
NO_PHASES = "which weights are trained does not change under way"
REFUSED: dict[type[lightning.Callback], str] = {
    lightning.BatchSizeFinder: NO_BATCH,
    lightning.GradientAccumulationScheduler: NO_BATCH,
    lightning.LearningRateFinder: "it drives the loop itself; opd study compares learning rates",
    lightning.StochasticWeightAveraging: "it drives the schedule; use callbacks.AveragedWeights",
    lightning.ModelPruning: NO_PHASES,
    BaseFinetuning: NO_PHASES,
}
# Prefixes of metrics that this package alone logs
LOGGED = ("val", "opd", "rl", "rollout", "optim", "reuse")


def callbacks_of(trainer: Trainer) -> list[lightning.Callback]:
    """Return a trainer's callbacks, which a connector sets and its class does not declare."""
    callbacks: list[lightning.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def check_trainer(trainer: Trainer) -> None:
    """Refuse what would do nothing, or harm, before anything is loaded.

    Raises:
        UserError: An option of the Trainer, or a callback, does not go with on-policy distillation.
    """
    if trainer.accumulate_grad_batches != 1:
        raise UserError(
            f"trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}: {NO_BATCH}, so "
            "leave it at 1"
        )
    if trainer.gradient_clip_val:
        raise UserError(
            f"trainer.gradient_clip_val {trainer.gradient_clip_val}: gradients are clipped to "
            "model.max_grad_norm; set that"
        )
    for callback in callbacks_of(trainer):
        for refused, reason in REFUSED.items():
            if isinstance(callback, refused):
                raise UserError(f"trainer.callbacks: {type(callback).__name__}: {reason}")
    for name in ("val_check_interval", "check_val_every_n_epoch"):
        if getattr(trainer, name) == 0:
            raise UserError(
                f"trainer.{name} 0: to validate never, set --trainer.limit_val_batches 0"
            )


def check_monitors(trainer: Trainer, logged: Iterable[str]) -> None:
    """Refuse to watch a metric that will never come.

    Args:
        trainer: Whose callbacks.
        logged: Names of the metrics that this package logs.

    Raises:
        UserError: A callback's ``monitor`` is none of them, but looks like one.
    """
    names = sorted(set(logged))
    for callback in callbacks_of(trainer):
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor not in names and monitor.startswith(_prefixes()):
            near = [name for name in names if name.partition("/")[0] == monitor.partition("/")[0]]
            instead = f"there are {', '.join(near)}" if near else "this run does not validate"
            raise UserError(
                f"{type(callback).__name__}.monitor {monitor}: there is no such metric; {instead}"
            )


def _prefixes() -> tuple[str, ...]:
    return tuple(f"{prefix}/" for prefix in LOGGED)
