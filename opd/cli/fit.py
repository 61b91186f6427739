"""LightningCLI for this project: the run folder, its loggers and callbacks, and resuming."""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import RunCheckpoint, RunSummary, SampleWriter
from opd import checkpoints
from opd.checkpoints import newest_checkpoint
from opd.cli import ranks
from opd.errors import UserError
from opd.metrics_csv import MetricsCSV, read_metrics
from opd.module import OPDModule
from opd.prompts import PromptDataModule
from opd.strategies import ShardedStrategy

log = logging.getLogger(__name__)

SUBCOMMANDS = ("fit", "validate", "test", "predict")
OUTPUT_VARIABLE = "OPD_OUTPUT"  # tells ranks that a launcher starts which folder rank 0 has chosen
RUN_FILES = ("checkpoints", "samples", "*.csv", "*.json", "*.yaml", "events.out.tfevents.*")
PARSER_OPTIONS = {"exit_on_error": False}


class OPDCLI(LightningCLI):
    """fit, validate, test and predict on an OPDModule and a PromptDataModule.

    Besides LightningCLI's arguments there are ``--output``, ``--overwrite``, and the groups
    ``--checkpoint`` (Lightning's ModelCheckpoint) and ``--samples`` (SampleWriter), so that
    ``trainer.callbacks`` holds only what the user adds.
    """

    @classmethod
    def run(cls) -> OPDCLI:
        """Parse sys.argv, build everything, run the subcommand."""
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # Lightning's own
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # we log reduced values
        warnings.filterwarnings("ignore", message=".*ModelCheckpoint with manual optimization.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # a resumed run's
        return cls(
            OPDModule,
            PromptDataModule,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveFitConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "max_epochs": -1,
                "num_sanity_val_steps": -1,  # validates the untrained student, all of it
                "check_val_every_n_epoch": None,
                "val_check_interval": 50,
                "log_every_n_steps": 1,
                "callbacks": [RunSummary()],
            },
            parser_kwargs={
                **PARSER_OPTIONS,
                **{name: dict(PARSER_OPTIONS) for name in SUBCOMMANDS},
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run folder, our two configurable callbacks, and what follows from other keys."""
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="Run folder. Default: runs/<recipe>/<time>.",
        )
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="Delete an earlier run in the folder instead of refusing to start.",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SampleWriter, "samples")
        parser.set_defaults(
            {
                "checkpoint.filename": "step={step:06d}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.every_n_train_steps": 50,
                "checkpoint.save_last": "link",
                "checkpoint.save_on_train_epoch_end": False,
                "checkpoint.enable_version_counter": False,  # a resumed run has one last.ckpt too
            }
        )
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=_seed)
        parser.link_arguments(("model.tokenizer", "model.student"), "data.tokenizer", _first)
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")

    # --- the run folder -------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Choose and check the run folder, and find the checkpoint to resume.

        Raises:
            UserError: The folder cannot be written, or already holds a run.
        """
        options = self._options
        if (size := ranks.torchrun_size()) is not None:  # the ranks are there: its numbers hold
            options.trainer.devices, options.trainer.num_nodes = size
        self.folder: Path | None = None
        if self.subcommand not in ("fit", "predict") and options.output is None:
            return
        self.folder = _run_folder(options.output, [str(c) for c in options.config or []])
        options.output = options.trainer.default_root_dir = str(self.folder)
        options.checkpoint.dirpath = str(self.folder / "checkpoints")
        resuming = options.ckpt_path is not None
        if self.subcommand == "fit" and not resuming:
            _refuse_or_clear(self.folder, overwrite=options.overwrite)
        if options.ckpt_path == "last":
            newest = newest_checkpoint(self.folder / "checkpoints")
            if newest is None:
                log.warning("--ckpt_path last: %s holds no checkpoint; starting anew", self.folder)
            options.ckpt_path = None if newest is None else str(newest)
        elif resuming and not Path(options.ckpt_path).exists():
            raise UserError(f"--ckpt_path {options.ckpt_path}: there is no such checkpoint")

    def instantiate_classes(self) -> None:
        """Build trainer, module and data.

        Raises:
            UserError: An argument of one of the classes is wrong; jsonargparse hides it in a
                ValueError that lists every type that a Union could have had.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None
        path, sharded = self._options.ckpt_path, isinstance(self.trainer.strategy, ShardedStrategy)
        if path is not None and checkpoints.is_sharded(Path(path)) and not sharded:
            raise UserError(
                f"--ckpt_path {path}: holds shards; go on with --config configs/strategy/fsdp2.yaml"
                f", on any number of devices, or begin anew from it with --model.student {path}"
            )

    @property
    def _options(self) -> Any:
        assert self.subcommand is not None
        return self.config[self.subcommand]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard and metrics.csv in the run folder, unless the user names loggers.

        Raises:
            UserError: The Trainer does not take an argument, or two of them together.
        """
        chosen = self._get(self.config_init, "trainer").get("logger")
        if chosen in (None, True):
            kwargs["logger"] = False
            if self.folder is not None and self.subcommand == "fit":
                kwargs["logger"] = [
                    TensorBoardLogger(str(self.folder), name="", version=""),
                    MetricsCSV(self.folder),
                ]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error

    def after_fit(self) -> None:
        """Say where the results are."""
        if self.trainer.is_global_zero and self.folder is not None:
            print(f"run folder: {self.folder}")

    def after_predict(self) -> None:
        """Say where the results are."""
        if self.trainer.is_global_zero and self.folder is not None:
            print(f"wrote {self.folder / 'predictions.jsonl'}")


class SaveFitConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder; only fit makes a run."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write the file, if all ranks have the same to write.

        Raises:
            UserError: They do not: ``--ckpt_path last`` has found different checkpoints, perhaps.
        """
        if stage == "fit":
            self._check_same_on_all_ranks(trainer)
            super().setup(trainer, pl_module, stage)

    def _check_same_on_all_ranks(self, trainer: Trainer) -> None:
        ours = {key: str(value) for key, value in vars(self.config.as_flat()).items()}
        first = trainer.strategy.broadcast(ours)
        different = [key for key in first if ours.get(key) != first[key]]
        if trainer.strategy.reduce_boolean_decision(bool(different), all=False):
            what = [f"{key} is {ours.get(key)} here, {first[key]} on rank 0" for key in different]
            raise UserError(
                "ranks do not have the same configuration or see different run folders: "
                f"{'; '.join(what) or 'see the other ranks'}"
            )


def _seed(seed_everything: bool | int) -> int:
    return 0 if isinstance(seed_everything, bool) else seed_everything


def _first(tokenizer: str | None, student: str) -> str:
    return tokenizer or student


def _run_folder(output: str | None, configs: list[str]) -> Path:
    """Return the run folder, made and writable."""
    if output is None:
        output = os.environ.get(OUTPUT_VARIABLE)
    if output is None:
        if ranks.world_size() > 1:
            raise UserError("name the run folder with --output when a launcher starts the ranks")
        recipe = Path(configs[0]).stem if configs else "opd"
        output = f"runs/{recipe}/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    os.environ[OUTPUT_VARIABLE] = output
    folder = Path(output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    return folder


def _refuse_or_clear(folder: Path, *, overwrite: bool) -> None:
    """Never mix two runs in one folder, and never lose one by accident.

    All ranks refuse, since none waits for another yet; rank 0 alone clears.
    """
    if holds_a_run(folder) and not overwrite:
        raise UserError(
            f"--output {folder}: already holds a run; resume it with --ckpt_path last, choose "
            "another folder, or delete it with --overwrite true"
        )
    for name in RUN_FILES if ranks.place() is None else ():
        for path in folder.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def holds_a_run(folder: Path) -> bool:
    """Whether a folder holds at least one step of a run."""
    if any((folder / "checkpoints").glob("*.ckpt")):
        return True
    metrics = folder / "metrics.csv"
    return metrics.is_file() and any(row["step"] != "0" for row in read_metrics(metrics))
