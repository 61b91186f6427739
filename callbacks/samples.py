"""Writes rollouts as JSONL, one record per completion, each token with its reverse KL.

Of training steps, what was sampled there; of validations, always the same prompts, each token with
its text, and once what the teachers say themselves. ``opd report`` shows these side by side.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from callbacks.earlier_run import refuse_to_replace
from opd.errors import UserError
from opd.evaluation import Evaluation, listen
from opd.module import OPDModule
from opd.rollouts import rollout_records
from opd.step import StepOutput

TEACHER_TOKENS = 512  # of a teacher's completions: enough to look at, at small cost
FILES = ("samples/step_*.jsonl", "validation/step_*.jsonl", "validation/teacher.jsonl")


class SampleWriter(Callback):
    """Writes ``samples/step_NNNNNN.jsonl`` in training and ``predictions.jsonl`` in predict.

    Each validation of a fit writes ``validation/step_NNNNNN.jsonl``, and the first one, before
    training, ``validation/teacher.jsonl``: completions of the teachers, cut at 512 tokens, and what
    the untrained student thinks of each token. (Not of a teacher that is sharded or offloaded.)

    Args:
        every_n_steps: Steps between files; 0: none in training.
        rollouts: Completions per file, of this step's rank 0; 0: none in training.
        held_out: Validation prompts, the first so many, whose completions each validation writes;
            0: none.

    Attributes:
        overwrite: Whether files of an earlier run may go; the command line guards its folder.

    Raises:
        UserError: One of them is negative.
    """

    overwrite = False

    def __init__(self, every_n_steps: int = 10, rollouts: int = 16, held_out: int = 16) -> None:
        for name, value in [
            ("every_n_steps", every_n_steps),
            ("rollouts", rollouts),
            ("held_out", held_out),
        ]:
            if value < 0:
                raise UserError(f"samples.{name}={value} must not be negative; 0 writes none")
        self.every_n_steps = every_n_steps
        self.rollouts = rollouts
        self.held_out = held_out
        self._student: list[dict[str, Any]] = []  # records of this validation, of all ranks
        self._teacher: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for an earlier run's files.

        Raises:
            UserError: There are some.
        """
        if not self.overwrite:
            refuse_to_replace(trainer, FILES)

    @rank_zero_only
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step, off = trainer.global_step, not (self.every_n_steps and self.rollouts)
        if off or not isinstance(pl_module, OPDModule) or step % self.every_n_steps:
            return
        records: list[dict[str, Any]] = []
        output: StepOutput = outputs["step"]
        for micro, values in zip(output.micro_batches, output.values, strict=True):
            if len(records) >= self.rollouts:
                break
            if micro.num_tokens:
                token_kl = values.get("opd/reverse_kl")  # a teacher of sampled tokens has none
                columns = {} if token_kl is None else {"reverse_kl": micro.spread(token_kl)}
                records += rollout_records(micro, pl_module.tokenizer, **columns)
        path = Path(trainer.default_root_dir) / "samples" / f"step_{step:06d}.jsonl"
        write_jsonl(path, records[: self.rollouts])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._student, self._teacher = [], []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        missing = self.held_out - len(self._student)
        off = trainer.state.fn != "fit" or trainer.fast_dev_run  # type: ignore[attr-defined]
        if off or missing <= 0 or not isinstance(pl_module, OPDModule):
            return
        world = pl_module.world
        # Prompts are dealt to the ranks in turn: of the first that are missing, so many are here
        count = len(range(world.rank, missing, world.size))
        chosen = batch.select(range(min(count, len(batch))))

        def gathered(evaluation: Evaluation) -> list[dict[str, Any]]:
            rows = {prompt.row for prompt in chosen.prompts}
            parts = world.gather(evaluation.records(pl_module.tokenizer, rows))
            return sorted(itertools.chain(*parts), key=lambda record: record["row"])

        self._student += gathered(outputs["evaluation"])
        if trainer.sanity_checking:
            with pl_module.ledger.phase("validation"), trainer.precision_plugin.val_step_context():
                heard = listen(pl_module, chosen, TEACHER_TOKENS)
            self._teacher += gathered(heard)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir) / "validation"
        for name, records in [
            (f"step_{trainer.global_step:06d}", self._student),
            ("teacher", self._teacher),
        ]:
            if records:
                write_jsonl(folder / f"{name}.jsonl", records)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.overwrite:
            refuse_to_replace(trainer, ["predictions.jsonl"])
        write_jsonl(self._predictions(trainer), [])

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        with self._predictions(trainer).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the ranks' files together, in the order of the prompts."""
        trainer.strategy.barrier()
        if trainer.world_size > 1 and trainer.is_global_zero:
            parts = [self._predictions(trainer, rank) for rank in range(trainer.world_size)]
            lines = [line for part in parts for line in part.read_text("utf-8").splitlines()]
            records = sorted(map(json.loads, lines), key=lambda record: record["row"])
            write_jsonl(Path(trainer.default_root_dir) / "predictions.jsonl", records)
            for part in parts:
                part.unlink()

    @staticmethod
    def _predictions(trainer: Trainer, rank: int | None = None) -> Path:
        part = f"_rank{trainer.global_rank if rank is None else rank}"
        name = "predictions" + (part if trainer.world_size > 1 else "")
        return Path(trainer.default_root_dir) / f"{name}.jsonl"


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
