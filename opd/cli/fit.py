"""LightningCLI for this project: the run folder, its loggers and callbacks, and resuming."""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero, rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

from callbacks import RunCheckpoint, RunSummary, SampleWriter, UpdateGeometry
from opd import checkpoints
from opd.cli import explain, ranks, recipes, run_folder
from opd.compatibility import callbacks_of
from opd.errors import UserError
from opd.metrics_csv import MetricsCSV
from opd.module import OPDModule
from opd.prompts import PromptDataModule
from opd.strategies import ShardedStrategy

NOT_SAVED = ("output", "overwrite", "ckpt_path", "checkpoint.dirpath", "trainer.default_root_dir")
UNTOLD = re.compile(  # what may differ after a resume, or is told where it is made to hold
    rf"({'|'.join(map(re.escape, NOT_SAVED))}|config|trainer\.(max_\w+|logger|enable_\w+)"
    r"|model\.(optimizer|scheduler))\b"
)
PARSER_OPTIONS = {"exit_on_error": False, "allow_abbrev": False}
OURS = ("opd", "callbacks", "eval", "tasks")

log = logging.getLogger(__name__)


class OPDCLI(LightningCLI):
    """fit, validate, test and predict on an OPDModule and a PromptDataModule.

    Besides LightningCLI's arguments there are ``--output``, ``--overwrite``, and the groups
    ``--checkpoint`` (Lightning's ModelCheckpoint) and ``--samples`` (SampleWriter), so that
    ``trainer.callbacks`` holds only what the user adds.
    """

    _lock: int | None = None  # on the run folder
    _made: Sequence[Path] = ()  # folders that were not there before

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        finally:
            for folder in self._made:  # if the run has left nothing there
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if self._lock is not None:
                os.close(self._lock)

    @classmethod
    def run(cls) -> OPDCLI:
        """Parse sys.argv, which begins with the subcommand, build everything and run it."""
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # Lightning's own
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # we log reduced values
        warnings.filterwarnings("ignore", message=".*ModelCheckpoint with manual optimization.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # a resumed run's
        warnings.filterwarnings("ignore", message=".*across ranks is zero.*")  # no validation
        logging.getLogger(rank_zero.__name__).addFilter(_is_no_advertisement)
        return cls(
            OPDModule,
            PromptDataModule,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=RunStart,
            trainer_defaults={
                "max_epochs": -1,
                "num_sanity_val_steps": -1,  # validates the untrained student, all of it
                "check_val_every_n_epoch": None,
                "val_check_interval": 50,
                "log_every_n_steps": 1,
                "enable_autolog_hparams": False,  # there are none, and it opens the events early
                "callbacks": [RunSummary()],
            },
            parser_kwargs={**PARSER_OPTIONS, _asked(): dict(PARSER_OPTIONS)},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one that is asked for: a parser of each of the four takes a while."""
        return {_asked(): LightningCLI.subcommands()[_asked()]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose ``--config`` takes names too."""
        parser = LightningArgumentParser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=recipes.ConfigAction,
            help=f"YAML file, or one of {', '.join(recipes.names())}. Later ones win.",
        )
        return parser

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
            help="Replace an earlier run in the folder, and nothing else, instead of refusing.",
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
        for action in parser._actions:
            if hasattr(action, "_typehint"):
                action._typehint = _integers_first(action._typehint)
        # Defaults of Lightning's callbacks, which the parser writes out to compare them
        yaml.SafeDumper.add_multi_representer(
            Enum, lambda dumper, member: dumper.represent_data(member.value)
        )

    # --- the run folder -------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Choose and check the run folder, and find the checkpoint to resume.

        Raises:
            UserError: The folder cannot be written, or holds what must not be lost.
        """
        options = self._options
        _check_options(options, self.subcommand)
        if (size := ranks.torchrun_size()) is not None:  # the ranks are there: its numbers hold
            options.trainer.devices, options.trainer.num_nodes = size
        self.folder: Path | None = None
        if self.subcommand in ("fit", "predict") or options.output is not None:
            configs = [str(config) for config in options.config or []]
            self.folder, made = run_folder.choose(options.output, configs)
            options.output = options.trainer.default_root_dir = str(self.folder)
            options.checkpoint.dirpath = str(self.folder / "checkpoints")
            if ranks.name() is None:
                self._made = made
                self._lock = run_folder.lock(self.folder)
        if self.subcommand == "fit":
            self._plan_fit()
            return
        checkpoint = run_folder.find_checkpoint(self.folder, options.ckpt_path)
        if options.ckpt_path == "last" and checkpoint is None:
            raise UserError(f"--ckpt_path last: {self.folder} holds no checkpoint")
        options.ckpt_path = None if checkpoint is None else str(checkpoint)
        if self.subcommand == "predict" and self.folder is not None and not options.overwrite:
            predictions = self.folder / "predictions.jsonl"
            if predictions.exists():
                raise UserError(f"{predictions} exists; replace it with --overwrite true")

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning looks for options in it, before it is checked; ours hold none."""

    def _plan_fit(self) -> None:
        options = self._options
        assert self.folder is not None
        if ranks.name() is None:  # a run that was killed before its first step
            run_folder.bring_back(self.folder)
        start = run_folder.plan(self.folder, options.ckpt_path, overwrite=options.overwrite)
        options.ckpt_path = None if start.checkpoint is None else str(start.checkpoint)
        if options.trainer.fast_dev_run and run_folder.holds_a_run(self.folder):
            raise UserError(f"--output {self.folder}: holds a run; fast_dev_run needs another one")
        run_folder.check_unread(start, _leaves(options.as_dict()))
        self.save_config_kwargs = {"start": start}

    def instantiate_classes(self) -> None:
        """Build trainer, module and data.

        Raises:
            UserError: One of the classes refuses its arguments, or lacks a package.
        """
        try:
            super().instantiate_classes()
        except Exception as error:  # the classes are the user's choice, and raise what they like
            cause = explain.cause(error)
            if isinstance(cause, UserError):
                raise cause from None
            if explain.raised_in(cause) in OURS:
                raise
            raise UserError(explain.one_line(error)) from error
        path, sharded = self._options.ckpt_path, isinstance(self.trainer.strategy, ShardedStrategy)
        if path is not None and checkpoints.is_sharded(Path(path)) and not sharded:
            raise UserError(
                f"--ckpt_path {path}: holds shards; go on with --config strategy/fsdp2, "
                f"on any number of devices, or begin anew from it with --model.student {path}"
            )

    @property
    def _options(self) -> Any:
        assert self.subcommand is not None
        return self.config[self.subcommand]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to the user's loggers or to TensorBoard, and always to metrics.csv.

        Raises:
            UserError: The Trainer does not take an argument, or two of them together.
        """
        chosen = self._get(self.config_init, "trainer").get("logger")
        loggers = [chosen] if isinstance(chosen, Logger) else chosen
        if self.folder is not None and self.subcommand == "fit":
            events = [RunEvents(self.folder)] if loggers in (None, True) else loggers or []
            kwargs["logger"] = [*events, MetricsCSV(self.folder)]
        elif loggers in (None, True):
            kwargs["logger"] = False
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        except RuntimeError as error:
            if twice := re.search(r"more than one stateful callback of type `(\w+)`", str(error)):
                raise UserError(
                    f"trainer.callbacks: {twice[1]} is there twice; keep one"
                ) from error
            raise
        for callback in callbacks_of(trainer):
            if isinstance(callback, RunSummary | SampleWriter | UpdateGeometry):
                callback.overwrite = True  # what may go, the run folder decides
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; if a fit ends before it has done a step, what it was to replace comes back.

        Raises:
            UserError: Lightning refuses an option, which it does with errors of all types.
        """
        callbacks = callbacks_of(self.trainer)
        start = next((c for c in callbacks if isinstance(c, RunStart)), None)
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            if start is not None:
                start.undo()
            early = start is None or not start.settled
            if early and isinstance(error, Exception) and explain.is_refusal_of_lightning(error):
                raise UserError(explain.one_line(error)) from error
            raise

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"seed_everything: {error}") from error

    def after_fit(self) -> None:
        """Say where the results are."""
        if self.trainer.is_global_zero and self.folder is not None:
            print(f"run folder: {self.folder}")

    def after_predict(self) -> None:
        """Say where the results are."""
        if self.trainer.is_global_zero and self.folder is not None:
            print(f"wrote {self.folder / 'predictions.jsonl'}")


class RunEvents(TensorBoardLogger):
    """TensorBoard events of a run folder; none of a run that has not begun.

    Args:
        folder: The run folder.
    """

    begun = False

    def __init__(self, folder: Path) -> None:
        suffix = run_folder.EVENTS_SUFFIX
        super().__init__(str(folder), name="", version="", filename_suffix=suffix)

    @property
    def experiment(self) -> Any:
        """The writer; to the Trainer, which asks before models are loaded, there is none yet."""
        if not self.begun:
            raise AttributeError("experiment: the run has not begun")
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one event for all metrics, where the base class writes one for each."""
        values = [Summary.Value(tag=name, simple_value=v) for name, v in metrics.items()]
        self.experiment._get_file_writer().add_summary(Summary(value=values), step)

    def finalize(self, status: str) -> None:
        if self._experiment is not None:
            super().finalize(status)


class RunStart(SaveConfigCallback):
    """Takes the run folder over at the last moment before a fit writes, and saves config.yaml.

    By then models, data and options have been found good, on all ranks.

    Args:
        parser: Of the subcommand.
        config: What has been parsed.
        start: What goes when the run has done its first step.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        start: run_folder.Start | None = None,
    ) -> None:
        super().__init__(parser, config)
        self.start = start
        self.begun = self.settled = False

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Compare the ranks' configurations.

        Raises:
            UserError: They differ: ``--ckpt_path last`` has found different checkpoints, perhaps.
        """
        if stage == "fit":
            self._check_same_on_all_ranks(trainer)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._begin(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        if self.begun or self.start is None:
            return
        self.begun, failure = True, None
        if trainer.is_global_zero:
            try:
                run_folder.begin(self.start)
                self._save_config(self.start.folder / "config.yaml")
            except (OSError, UserError) as error:
                failure = str(error)
        if failure := trainer.strategy.broadcast(failure):
            raise UserError(failure)
        for logger in trainer.loggers:
            if isinstance(logger, RunEvents):
                logger.begun = True

    def _save_config(self, path: Path) -> None:
        """Save what repeats the run elsewhere: not where it was, nor what it went on from."""
        config = self.config.clone()
        for key in NOT_SAVED:
            config[key] = False if key == "overwrite" else None
        self.parser.save(config, path, skip_none=False, overwrite=True, multifile=False)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self.start is not None and not self.settled:
            self.settled = True
            if trainer.is_global_zero:
                run_folder.settle(self.start.folder)

    def state_dict(self) -> dict[str, Any]:
        """Return the options, so that a resumed run can say which of them are others."""
        return {"options": self._told()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say which options are not those that the checkpoint was saved with."""
        before, now = state_dict["options"], self._told()
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names and ranks.name() is None:
            what = "; ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in names)
            log.warning("resumed with other options than the checkpoint was saved with: %s", what)

    def _told(self) -> dict[str, str]:
        options = vars(self.config.as_flat())
        return {key: str(value) for key, value in options.items() if not UNTOLD.match(key)}

    def undo(self) -> None:
        """Bring the old run back, if this one has done no step."""
        if self.start is not None and self.begun and not self.settled and ranks.name() is None:
            run_folder.bring_back(self.start.folder)

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


def _check_options(options: Any, subcommand: str | None) -> None:
    """Refuse options that would do nothing, since the run folder decides.

    Raises:
        UserError: One is set.
    """
    trainer, fits = options.trainer, subcommand == "fit"
    if fits or options.output is not None:
        for key in ("checkpoint.dirpath", "trainer.default_root_dir"):
            if options[key] is not None:
                raise UserError(
                    f"{key}: all that a run writes goes into its folder; name that with --output"
                )
    if trainer.barebones:
        raise UserError("trainer.barebones: nothing of a run would be left; leave it out")
    if fits and trainer.enable_checkpointing is False:
        raise UserError(
            "trainer.enable_checkpointing false: a run that is stopped is always saved; to save "
            "nothing else, set --checkpoint.every_n_train_steps beyond trainer.max_steps, and "
            "--checkpoint.save_end false"
        )
    if fits and trainer.limit_train_batches == 0:
        raise UserError("trainer.limit_train_batches 0: there is nothing to do; see opd validate")


def _integers_first(hint: Any) -> Any:
    """Let 1 be the integer 1 where a type is ``float | int``: one batch, not all of them.

    Lightning writes ``int | float``, but typing may hand out an equal Union that it already has.
    """
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    members = typing.get_args(hint)
    if not {int, float} <= set(members):
        return hint
    return functools.reduce(operator.or_, [int, *(m for m in members if m is not int)])


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's is about the run, and not about what else one might install."""
    return "Tip: For seamless cloud" not in record.getMessage()


def _asked() -> str:
    """The subcommand, with which sys.argv begins."""
    return sys.argv[1]


def _seed(seed_everything: bool | int) -> int:
    return 0 if isinstance(seed_everything, bool) else seed_everything


def _first(tokenizer: str | None, student: str) -> str:
    return tokenizer or student


def _leaves(options: Any) -> Iterable[object]:
    """Walk through the values of nested options."""
    if isinstance(options, dict | list | tuple):
        for value in options.values() if isinstance(options, dict) else options:
            yield from _leaves(value)
    else:
        yield options
