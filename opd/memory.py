"""Out of memory: said in one line that names what lowers it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opd.errors import OutOfMemoryError, UserError

# Of CUDA's own libraries, and of the CPU's allocator, which have no type of their own
MARKS = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
REMEDY = (
    "lower model.micro_batch_tokens, set model.gradient_checkpointing true, or give the rollout "
    "engine a batch_size (--model.engine opd.rollouts.TransformersEngine --model.engine.batch_size "
    "N)"
)


@contextmanager
def needed_for(what: str, *, weights_change: bool = False) -> Iterator[None]:
    """Say what a part of a step was, if there is not enough memory for it.

    Args:
        what: The part.
        weights_change: Whether it may have changed some of the weights by then.

    Raises:
        OutOfMemoryError: There is not, and the weights are those of a whole step.
        UserError: There is not, and they may not be.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0].strip()
        if weights_change:
            raise UserError(
                f"out of memory in {what}, which is half done: share it out with --config "
                f"strategy/fsdp2, and go on from the last checkpoint ({reason})"
            ) from error
        raise OutOfMemoryError(f"out of memory for {what}: {REMEDY} ({reason})") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up, of a GPU or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in MARKS)
