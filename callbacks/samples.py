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
from opd.prompts import Prompt, PromptBatch, PromptDataModule
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
        held_out: Validation prompts whose completions each validation writes: the first so many, of
            several data sets equally many; 0: none.

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
        # Of this validation: the rows to write, and this rank's prompts and completions of them
        self._rows: frozenset[int] = frozenset()
        self._prompts: list[Prompt] = []
        self._records: list[dict[str, Any]] = []

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
        data = getattr(trainer, "datamodule", None)
        fits = trainer.state.fn == "fit" and not trainer.fast_dev_run  # type: ignore[attr-defined]
        known = data.validation_prompts if fits and isinstance(data, PromptDataModule) else []
        self._rows = first_rows(known, self.held_out)
        self._prompts, self._records = [], []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._rows and isinstance(pl_module, OPDModule):
            evaluation: Evaluation = outputs["evaluation"]
            self._records += evaluation.records(pl_module.tokenizer, self._rows)
            self._prompts += [prompt for prompt in batch.prompts if prompt.row in self._rows]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what student and teachers have said; the latter once, before training."""
        if not (self._rows and isinstance(pl_module, OPDModule)):
            return
        files = {f"step_{trainer.global_step:06d}": self._records}
        if trainer.sanity_checking:
            pad_id = pl_module.sampler.pad_token_id
            prompts = PromptBatch.collate(self._prompts, pad_id).to(pl_module.device)
            with pl_module.ledger.phase("validation"), trainer.precision_plugin.val_step_context():
                heard = listen(pl_module, prompts, TEACHER_TOKENS)
            files["teacher"] = heard.records(pl_module.tokenizer, self._rows)
        for name, mine in files.items():
            records = list(itertools.chain(*pl_module.world.gather(mine)))
            if records and trainer.is_global_zero:
                path = Path(trainer.default_root_dir) / "validation" / f"{name}.jsonl"
                write_jsonl(path, sorted(records, key=lambda record: record["row"]))

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


def first_rows(prompts: Iterable[Prompt], count: int) -> frozenset[int]:
    """Choose the first rows, from several data sets in turn."""
    by_set: dict[str | None, list[int]] = {}
    for prompt in prompts:
        by_set.setdefault(prompt.data_set, []).append(prompt.row)
    turns = itertools.zip_longest(*by_set.values())
    rows = (row for turn in turns for row in turn if row is not None)
    return frozenset(itertools.islice(rows, count))


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
