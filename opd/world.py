"""The processes of a run, as far as a step needs them; without a Trainer there is only this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from opd import sharding
from opd.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

T = TypeVar("T")


def rank() -> int:
    """Number of this process among those of the run."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def gather(value: T) -> list[T]:
    """Give all processes of the run what each of them has, in the order of their ranks."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[T | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return cast(list[T], values)


def together(function: Callable[[], T]) -> T:
    """Do something on every rank; if one fails, all fail, and none waits for it.

    Raises:
        UserError: Another rank has failed. This one's own failure is raised as it is.
    """
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    reasons = gather(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for number, reason in enumerate(reasons):
        if reason is not None:
            raise UserError(f"rank {number} has failed: {reason}")
    return cast(T, result)


class World:
    """Sums, maxima and messages over ranks; every method is a collective.

    Args:
        strategy: Lightning's strategy; None: there is one process.
    """

    def __init__(self, strategy: Strategy | None = None) -> None:
        self._strategy = strategy
        self.size = int(getattr(strategy, "world_size", 1))
        self.rank = int(getattr(strategy, "global_rank", 0))

    def sum(self, value: Tensor) -> Tensor:
        """Add up a tensor over ranks."""
        return self._reduce(value, "sum")

    def max(self, value: Tensor) -> Tensor:
        """Take the largest over ranks, element by element."""
        return self._reduce(value, "max")

    def _reduce(self, value: Tensor, operation: str) -> Tensor:
        if self._strategy is None:
            return value
        own = value.to(self._strategy.root_device, copy=True)  # some strategies reduce in place
        reduced = self._strategy.reduce(own, reduce_op=operation)
        assert isinstance(reduced, Tensor)
        return reduced

    def broadcast(self, value: T, source: int = 0) -> T:
        """Give all ranks what one of them has."""
        return value if self._strategy is None else self._strategy.broadcast(value, src=source)

    def gather(self, value: T) -> list[T]:
        """Give all ranks what each of them has, in the order of the ranks."""
        return gather(value)

    def together(self, function: Callable[[], T]) -> T:
        """See :func:`together`."""
        return together(function)

    def step(self, optimizer: Any) -> None:
        """Take an optimizer's step that Lightning does not count as one of ``global_step``."""
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if self._strategy is None:
            own.step()
        else:
            self._strategy.optimizer_step(own, lambda: None)

    def backward(self, loss: Tensor, model: torch.nn.Module, *, sync: bool) -> None:
        """Take gradients.

        Args:
            loss: A scalar. Data parallel strategies average gradients over ranks.
            model: The model that is trained, perhaps sharded.
            sync: Whether to sum gradients over ranks, or only to add them up on each.
        """
        # Lightning's bf16-mixed keeps autocast on in here; a backward under it would round the
        # products of the float32 head to bfloat16.
        with torch.autocast(loss.device.type, enabled=False):
            if self._strategy is None:
                loss.backward()
                return
            with sharding.summing_gradients(self._strategy.model, model, sync):
                self._strategy.backward(loss, None)
