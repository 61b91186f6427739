"""Runs lm-eval tasks on the live student while it trains. Logged as ``bench/<task>/<metric>``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from opd.errors import UserError
from opd.log_once import log_once
from opd.module import OPDModule
from opd.sharding import gathered
from opd.strategies import FSDP1


class Benchmarks(Callback):
    """Evaluates the student with lm-eval every so many steps and at the end.

    Every rank does all problems, so that none waits for another. Callbacks act in their order:
    put it after EffOPD to evaluate the weights that a search has kept.

    Args:
        tasks: Names of lm-eval tasks, built in or from the folder tasks/.
        every_n_steps: Steps between evaluations; 0: only at the end.
        samples: Completions per problem.
        limit: Evaluate the first so many problems only.
        batch_size: Problems per batch.

    Raises:
        UserError: A number is out of range, or there is no task.
    """

    def __init__(
        self,
        tasks: list[str],
        every_n_steps: int = 100,
        samples: int = 1,
        limit: int | None = None,
        batch_size: int = 64,
    ) -> None:
        if not tasks:
            raise UserError("callbacks.Benchmarks.tasks names no task")
        for name, value, least in [
            ("every_n_steps", every_n_steps, 0),
            ("samples", samples, 1),
            ("limit", 1 if limit is None else limit, 1),
            ("batch_size", batch_size, 1),
        ]:
            if value < least:
                raise UserError(f"callbacks.Benchmarks.{name}={value} must be at least {least}")
        self.tasks = tasks
        self.every_n_steps = every_n_steps
        self.samples = samples
        self.limit = limit
        self.batch_size = batch_size

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, OPDModule) or isinstance(trainer.strategy, FSDP1):
            raise UserError(
                "callbacks.Benchmarks needs opd's module, and another strategy than FSDP1; use opd "
                "evaluate on its checkpoints"
            )
        from eval.harness import load_tasks, task_manager  # loads lm-eval: only when it is used

        load_tasks(task_manager(self.tasks), self.tasks, self.samples)  # or say so before a step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        from eval.harness import evaluate_model, metrics_of

        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if not due and trainer.global_step != trainer.max_steps:
            return
        assert isinstance(pl_module, OPDModule)
        with gathered(pl_module.student), trainer.precision_plugin.train_step_context():
            results = evaluate_model(
                pl_module.student,
                pl_module.tokenizer,
                self.tasks,
                samples=self.samples,
                limit=self.limit,
                batch_size=self.batch_size,
                seed=pl_module.seed,
            )
        scores = {f"bench/{name}": value for name, value in metrics_of(results).items()}
        log_once(trainer, pl_module, scores)
