"""Lightning strategies for models that do not fit one device.

Under ``FSDP2`` student, teacher, gradients, optimizer and EffOPD's copies are all spread over the
ranks. Precision ``bf16-mixed`` means float32 master weights, gathered and computed with as
bfloat16.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from opd import checkpoints
from opd.errors import UserError


class FSDP2(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy over all ranks, with checkpoints that are whole or absent.

    A checkpoint is a folder to which every rank writes its shards; any number of processes can go
    on from it.

    Args:
        timeout: After so long in one collective, a rank gives the others up for dead. It must
            exceed the difference between the fastest and the slowest rank's rollouts.
        process_group_backend: nccl, gloo; None: what suits the device.
    """

    def __init__(
        self,
        timeout: timedelta = timedelta(minutes=30),
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1, process_group_backend=process_group_backend, timeout=timeout
        )

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self._data_parallel_size = self.world_size

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
        failure = None
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
        except CheckpointException as error:  # the same on all ranks
            failure = "; ".join(f"rank {rank}: {e}" for rank, (e, _) in error.failures.items())
        except (OSError, RuntimeError) as error:
            failure = f"rank {self.global_rank}: {error}"
        if failure := self.broadcast(failure):
            if self.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(failure)
        if self.is_global_zero:
            remove(path)
            partial.rename(path)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read this rank's shards, and the rest, of a folder or of a single file.

        Raises:
            UserError: The checkpoint lacks something that the run needs.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        if not checkpoints.is_sharded(path):
            return super().load_checkpoint(path, weights_only)
        rest = checkpoints.read(path)
        available = {str(key) for key in checkpoints.shard_metadata(path).state_dict_metadata}
        assert self.model is not None
        state = get_model_state_dict(self.model)
        found = {name: t for name, t in state.items() if f"state_dict.{name}" in available}
        _check_missing(path, state, found)
        load_shards({"state_dict": found}, checkpoint_id=path)
        self.model.load_state_dict(found, strict=False)
        for i, optimizer in enumerate(self.optimizers):
            moments = {f"optimizer_{i}": get_optimizer_state_dict(self.model, optimizer)}
            load_shards(moments, checkpoint_id=path)
            set_optimizer_state_dict(
                self.model,
                optimizer,
                optim_state_dict=moments[f"optimizer_{i}"],
                options=StateDictOptions(cpu_offload=True),
            )
        return rest


def _check_missing(path: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """A callback's tensors may all be missing, if it is new; of everything else, nothing may."""
    present = {name.partition(".")[0] for name in found}
    missing = [
        name
        for name in wanted
        if name not in found
        and (name.partition(".")[0] in present or name.startswith(checkpoints.STUDENT_PREFIX))
    ]
    if missing:
        raise UserError(f"{path}: lacks {len(missing)} tensors of this run, as {missing[0]}")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
