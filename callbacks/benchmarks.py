"""Runs lm-eval tasks on the live student while it trains. Logged as ``bench/<task>/<metric>``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.accelerator import Accelerator, WatchesAccelerators
from opd import extrapolation, logs
from opd.errors import UserError
from opd.module import OPDModule
from opd.sharding import gathered

if TYPE_CHECKING:
    from eval.harness import Settings


class Benchmarks(Callback, WatchesAccelerators):
    """Evaluates the student on lm-eval tasks after some steps, and at the end.

    It samples with the run's own engine, as ``opd evaluate`` does, from seeds of its own: training
    goes on bit for bit as without it. Completions are divided over ranks, whatever the strategy.

    Args:
        tasks: Names of lm-eval tasks, built in or from the folder tasks/.
        every_n_steps: Steps between evaluations; 0: only at the end.
        schedule: Further steps, as EffOPD's: powers_of_two, 'every N', a step, or a list of these.
        around_searches: Evaluate before and after each search of EffOPD or another accelerator too;
            what was before is logged as ``bench/<task>/<metric>/before``.
        samples: Completions per problem.
        limit: Evaluate the first so many problems only.
        max_new_tokens: Longest completion in tokens. None: as the task says.
        batch_size: Completions sampled at a time.
        allow_code_execution: Run the programs that the student writes, in a sandbox.

    Raises:
        UserError: A number is out of range, or there is no task.
    """

    def __init__(
        self,
        tasks: list[str],
        every_n_steps: int = 100,
        schedule: str | int | list[str | int] | None = None,
        around_searches: bool = False,
        samples: int = 1,
        limit: int | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 64,
        allow_code_execution: bool = False,
    ) -> None:
        if not tasks:
            raise UserError("callbacks.Benchmarks.tasks names no task")
        for name, value, least in [
            ("every_n_steps", every_n_steps, 0),
            ("samples", samples, 1),
            ("limit", 1 if limit is None else limit, 1),
            ("max_new_tokens", 1 if max_new_tokens is None else max_new_tokens, 1),
            ("batch_size", batch_size, 1),
        ]:
            if value < least:
                raise UserError(f"callbacks.Benchmarks.{name}={value} must be at least {least}")
        self.tasks = tasks
        self.every_n_steps = every_n_steps
        self.schedule = None if schedule is None else extrapolation.parse_schedule(schedule)
        if self.schedule is not None and self.schedule.limit:
            raise UserError(f"callbacks.Benchmarks.schedule {schedule!r}: only a search adapts")
        self.around_searches = around_searches
        self.samples = samples
        self.limit = limit
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.allow_code_execution = allow_code_execution
        self._loaded: dict[str, Any] = {}  # the tasks, once their problems have been read

    def due(self, t: int) -> bool:
        """Whether to evaluate after step t."""
        every = bool(self.every_n_steps) and t % self.every_n_steps == 0
        return every or (self.schedule is not None and self.schedule.due(t))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the tasks, or say so before a step.

        Raises:
            UserError: A task is unknown or cannot be had, or the module is none of ours.
        """
        if not isinstance(pl_module, OPDModule):
            raise UserError("callbacks.Benchmarks needs opd's module; use opd evaluate")
        from eval.harness import load_tasks  # loads lm-eval: only when it is used

        self._loaded = load_tasks(self.tasks, self._settings(pl_module))

    def before_acceleration(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.around_searches:
            self._evaluate(trainer, pl_module, "/before")

    def after_acceleration(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.around_searches:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        t = trainer.global_step
        if self.around_searches and Accelerator.any_acts_after(trainer):
            return  # has been done
        if self.due(t) or t == trainer.max_steps:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, suffix: str = "") -> None:
        from eval.harness import evaluate_model
        from eval.kept import Kept
        from eval.runs import metrics_of

        assert isinstance(pl_module, OPDModule)
        world = pl_module.world
        kept = Kept(rank=world.rank, world_size=world.size)
        with gathered(pl_module.student), trainer.precision_plugin.train_step_context():
            results = world.together(  # only the first judges; if it fails, none may wait for it
                lambda: evaluate_model(
                    pl_module.student,
                    pl_module.tokenizer,
                    self._loaded,
                    pl_module.engine,
                    self._settings(pl_module),
                    kept=kept,
                )
            )
        scores = world.broadcast(metrics_of(results["results"]))
        named = {f"bench/{name}{suffix}": value for name, value in scores.items()}
        logs.log(trainer, named)

    def _settings(self, pl_module: OPDModule) -> Settings:
        from eval.harness import Settings

        return Settings(
            samples=self.samples,
            limit=self.limit,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            seed=pl_module.seed,
            allow_code_execution=self.allow_code_execution,
        )
