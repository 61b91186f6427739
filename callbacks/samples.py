"""Writes rollouts as JSONL, one record per completion, each token with its reverse KL."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from callbacks.earlier_run import refuse_to_replace
from opd.errors import UserError
from opd.module import OPDModule
from opd.rollouts import rollout_records
from opd.step import StepOutput


class SampleWriter(Callback):
    """Writes ``samples/step_NNNNNN.jsonl`` in training and ``predictions.jsonl`` in predict.

    Args:
        every_n_steps: Steps between files; 0: none in training.
        rollouts: Completions per file, of this step's rank 0; 0: none in training.

    Attributes:
        overwrite: Whether files of an earlier run may go; the command line guards its folder.

    Raises:
        UserError: One of them is negative.
    """

    overwrite = False

    def __init__(self, every_n_steps: int = 10, rollouts: int = 16) -> None:
        for name, value in [("every_n_steps", every_n_steps), ("rollouts", rollouts)]:
            if value < 0:
                raise UserError(f"samples.{name}={value} must not be negative; 0 writes none")
        self.every_n_steps = every_n_steps
        self.rollouts = rollouts

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for an earlier run's files.

        Raises:
            UserError: There are some.
        """
        if not self.overwrite:
            refuse_to_replace(trainer, ["samples/step_*.jsonl"])

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
