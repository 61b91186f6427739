"""Lightning strategies for models that do not fit one device: FSDP2, and its predecessor FSDP1.

Student, teacher, gradients, optimizer and EffOPD's copies are all spread over the ranks. Precision
``bf16-mixed`` means float32 master weights, gathered and computed with as bfloat16.

A checkpoint is a folder to which every rank writes its shards; it is whole or it is not there, and
any number of processes, under either strategy, can go on from it.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.optim import Optimizer
from transformers import PreTrainedModel

from opd import checkpoints, optimization, sharding, weights
from opd.errors import UserError
from opd.models import load_model
from opd.world import World

PATIENCE = timedelta(minutes=30)  # of one rank with the others, in one collective


def load_under(
    strategy: Strategy | None, source: str, *, trained: bool, offload: bool, **options: Any
) -> PreTrainedModel:
    """Load a model the way that a strategy wants to have it; a collective where it is sharded.

    Args:
        strategy: Lightning's; None: there is one process.
        source: See :func:`opd.models.load_model`.
        trained: Whether it is the student.
        offload: Keep its shards in host memory.
        options: Further options of :func:`opd.models.load_model`.

    Raises:
        UserError: It cannot be loaded, or the strategy cannot share it out.
    """
    load = functools.partial(load_model, source, **options)
    if isinstance(strategy, ShardedStrategy):
        if (adapter := options.get("adapter")) is not None and adapter.quantize is not None:
            raise UserError("model.adapter.quantize cannot be sharded: use --config strategy/ddp")
        return strategy.load_model(load, trained=trained, offload=offload)
    if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy | None):
        raise UserError(
            f"trainer.strategy {type(strategy).__name__} cannot share out student and teacher; "
            "use --config strategy/ddp, strategy/fsdp1 or strategy/fsdp2"
        )
    return load()


class ShardedStrategy(ParallelStrategy):
    """What FSDP1 and FSDP2 have in common: how models are loaded, and checkpoints."""

    def load_model(
        self, load: Callable[..., PreTrainedModel], *, trained: bool, offload: bool
    ) -> PreTrainedModel:
        """Load a model and spread it over the ranks; a collective.

        Args:
            load: Loads it; with ``weights=False``, without them and on the meta device.
            trained: Whether it is the student.
            offload: Keep its shards in host memory.
        """
        raise NotImplementedError

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What parameters are gathered in; None: their own dtype."""
        return torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None

    # --- checkpoints ----------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this rank's shards of what is trained, and of callbacks, copied to the CPU."""
        assert self.model is not None
        options = StateDictOptions(cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(self.model, options=options)

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """Return this rank's shards of an optimizer's state, copied to the CPU."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        assert self.model is not None
        options = StateDictOptions(cpu_offload=True)
        return get_optimizer_state_dict(self.model, optimizer, options=options)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a folder under another name, and give it its own when all ranks are done.

        Raises:
            OSError: A rank could not write; raised on all of them.
        """
        path = Path(self.broadcast(str(filepath)))
        partial = path.with_name(path.name + checkpoints.PARTIAL)
        if self.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        self.barrier()
        shards = {checkpoints.STATE_DICT: checkpoint.pop("state_dict")}
        for i, state in enumerate(checkpoint.pop("optimizer_states", [])):
            shards[f"optimizer_{i}"] = state

        def write() -> None:
            try:
                save_shards(shards, checkpoint_id=partial)
            except CheckpointException as error:  # the same on all ranks, and no Exception
                raise OSError(checkpoints.first_reason(error)) from error
            if self.is_global_zero:
                torch.save(checkpoint, partial / checkpoints.META_FILE)
                _give_name(partial, path)

        try:
            World(self).together(write)
        except Exception as error:
            if self.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(str(error)) from error

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read this rank's shards, and the rest, of a folder or of a single file.

        Raises:
            UserError: The checkpoint lacks something that the run needs.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        if not checkpoints.is_sharded(path):
            return self._load_file(path, weights_only)
        rest = checkpoints.read(path)
        available = {str(key) for key in checkpoints.shard_metadata(path).state_dict_metadata}
        assert self.model is not None
        state = self.lightning_module_state_dict()
        found = {name: t for name, t in state.items() if f"state_dict.{name}" in available}
        _check_names(path, state, found, available)
        checkpoints.read_shards(path, {checkpoints.STATE_DICT: found})
        self._set_state(found)
        for i, optimizer in enumerate(self.optimizers):
            if optimization.trains_others(optimizer):
                raise UserError(
                    f"{path}: {type(optimizer).__name__} cannot go on from shards; resume it "
                    "without FSDP only"
                )
            moments = {f"optimizer_{i}": get_optimizer_state_dict(self.model, optimizer)}
            checkpoints.read_shards(path, moments)
            set_optimizer_state_dict(
                self.model, optimizer, optim_state_dict=moments[f"optimizer_{i}"]
            )
        return rest

    def _load_file(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        return super().load_checkpoint(path, weights_only)

    def _set_state(self, state: dict[str, Any]) -> None:
        assert self.model is not None
        set_model_state_dict(self.model, state, options=StateDictOptions(strict=False))


def _check_names(
    path: Path, wanted: Mapping[str, Any], found: Mapping[str, Any], available: Iterable[str]
) -> None:
    """A callback's tensors may all be missing, if it is new; of everything else, nothing may.

    Nor may there be weights of a student that this run has not.
    """
    present = {name.partition(".")[0] for name in found}
    missing = [
        name
        for name in wanted
        if name not in found
        and (name.partition(".")[0] in present or name.startswith(checkpoints.STUDENT_PREFIX))
    ]
    if missing:
        raise UserError(f"{path}: lacks {len(missing)} tensors of this run, as {missing[0]}")
    names = {key.removeprefix(f"{checkpoints.STATE_DICT}.") for key in available}
    students = {name for name in names if name.startswith(checkpoints.STUDENT_PREFIX)}
    if beyond := sorted(students - wanted.keys()):
        raise UserError(
            f"{path}: holds {len(beyond)} weights that this run has not, as {beyond[0]}"
        )


def _give_name(partial: Path, path: Path) -> None:
    """Give a whole folder its name; what has had it is there, under another, until it is done."""
    old = path.with_name(checkpoints.REPLACED + path.name)
    replacing = path.exists()
    if replacing:
        path.rename(old)
    partial.rename(path)
    if replacing:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


class FSDP2(ShardedStrategy, ModelParallelStrategy):
    """Lightning's ModelParallelStrategy over all ranks.

    Rank 0 alone reads a model's weights, and sends the others their shards.

    Args:
        timeout: After so long in one collective, a rank gives the others up for dead. It must
            exceed the difference between the fastest and the slowest rank's rollouts.
        process_group_backend: nccl, gloo; None: what suits the device.
    """

    def __init__(
        self, timeout: timedelta = PATIENCE, process_group_backend: str | None = None
    ) -> None:
        super().__init__(
            tensor_parallel_size=1, process_group_backend=process_group_backend, timeout=timeout
        )

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = self.world_size

    def load_model(
        self, load: Callable[..., PreTrainedModel], *, trained: bool, offload: bool
    ) -> PreTrainedModel:
        """Read a model on rank 0 and spread it over the ranks; a collective.

        Raises:
            UserError: A rank cannot load it; raised on all ranks.
        """
        whole = World(self).together(lambda: load() if self.is_global_zero else None)
        model = World(self).together(lambda: load(weights=False))
        sharding.shard(
            model,
            whole,
            self.device_mesh["data_parallel"],
            self.root_device,
            compute_dtype=self.compute_dtype,
            trained=trained,
            offload=offload,
        )
        return model


class _Precision(FSDPPrecision):
    """Leaves batches alone: they hold token ids, and objects that Lightning cannot walk through."""

    def convert_input(self, data: Any) -> Any:
        return data

    convert_output = convert_input


class FSDP1(ShardedStrategy, FSDPStrategy):
    """Lightning's FSDPStrategy; prefer :class:`FSDP2`, which does the same with less memory.

    The student stays gathered from its rollout to the end of backward (SHARD_GRAD_OP): FSDP1 would
    otherwise gather every layer for every token. Every rank reads the whole model.

    Args:
        timeout: As of FSDP2.
        process_group_backend: nccl, gloo; None: what suits the device.
    """

    def __init__(
        self, timeout: timedelta = PATIENCE, process_group_backend: str | None = None
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timeout,
            sharding_strategy="SHARD_GRAD_OP",
            state_dict_type="sharded",
        )

    @property
    def precision_plugin(self) -> FSDPPrecision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        assert isinstance(plugin, FSDPPrecision | None)  # Lightning chooses it for the strategy
        self._precision_plugin = plugin and _Precision(cast(Any, plugin.precision))

    def load_model(
        self, load: Callable[..., PreTrainedModel], *, trained: bool, offload: bool
    ) -> PreTrainedModel:
        """Read a model on every rank and keep a share of it; a collective."""
        return sharding.wrap_with_fsdp1(
            World(self).together(load),
            self.root_device,
            compute_dtype=self.compute_dtype,
            trained=trained,
            offload=offload,
        )

    def _load_file(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        raise UserError(f"{path}: is of a run without shards; go on with it under FSDP2")

    # FSDP1 has no tensors that know which part of a parameter they hold, other than its own
    # parameters: a companion is saved and loaded in their place.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this rank's shards of the module's state, copied to the CPU."""
        state = super().lightning_module_state_dict()
        for name, companion in weights.companions(self._module):
            with weights.exchanged(self._module, companion):
                parameters = super().lightning_module_state_dict()
            for parameter, key in companion.keys_by_parameter():
                state[f"{name}.{key}"] = parameters[parameter]
        return state

    def _set_state(self, state: dict[str, Any]) -> None:
        for name, companion in weights.companions(self._module):
            keys = {f"{name}.{key}": parameter for parameter, key in companion.keys_by_parameter()}
            with weights.exchanged(self._module, companion):
                super()._set_state({keys[k]: t for k, t in state.items() if k in keys})
            state = {k: t for k, t in state.items() if k not in keys}
        super()._set_state(state)
