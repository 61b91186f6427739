"""Metrics of something that happens at some steps only."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer


def log_once(trainer: Trainer, pl_module: LightningModule, metrics: Mapping[str, float]) -> None:
    """Log metrics at this step, and let monitors see them.

    ``log_dict`` alone would keep the values until the epoch ends and log them again at every later
    step.
    """
    pl_module.log_dict(dict(metrics), logger=False)
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)
