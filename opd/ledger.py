"""What a run has spent: tokens and seconds, by phase. Logged as ``cost/*``."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

TOKENS = (
    "rollout_tokens",
    "search_tokens",
    "search_generated_tokens",
    "teacher_tokens",
    "train_tokens",
)
Mark = float | torch.cuda.Event
SECONDS = ("rollout", "teacher", "train", "search", "validation")


class Ledger:
    """Cumulative cost of a run, the same on all ranks after :meth:`synchronize`.

    Tokens are completion tokens, summed over ranks: sampled for training (rollout), read by
    teachers, trained on, once per pass, judged by searches, once per candidate, and by the guard of
    reused rollouts (search), and generated for searches (search_generated). Seconds are wall-clock,
    averaged over ranks.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = dict.fromkeys(self._names(), 0.0)
        self._new: dict[str, float] = defaultdict(float)
        self._phases: list[tuple[str, Mark, Mark]] = []

    @staticmethod
    def _names() -> list[str]:
        return [*TOKENS, *(f"{phase}_seconds" for phase in SECONDS)]

    def count(self, name: str, tokens: int) -> None:
        """Add tokens spent on this rank."""
        assert name in TOKENS, name
        self._new[name] += tokens

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the seconds of a block to a phase; phases do not nest."""
        assert name in SECONDS, name
        start = _mark()
        try:
            yield
        finally:
            self._phases.append((name, start, _mark()))

    def synchronize(self, reduce_sum: Callable[[Tensor], Tensor], world_size: int) -> None:
        """Add what all ranks have spent since the last call; a collective."""
        for phase, start, end in self._phases:
            self._new[f"{phase}_seconds"] += _seconds(start, end)
        self._phases.clear()
        names = self._names()
        new = torch.tensor([self._new[name] for name in names], dtype=torch.float64)
        for name, value in zip(names, reduce_sum(new).tolist(), strict=True):
            self.totals[name] += value / (world_size if name.endswith("seconds") else 1)
        self._new.clear()

    def metrics(self) -> dict[str, float]:
        """Totals under the names they are logged by."""
        costs = {f"cost/{name}": value for name, value in self.totals.items()}
        return {**costs, "cost/peak_memory_bytes": float(peak_memory_bytes())}


def peak_memory_bytes() -> int:
    """Peak memory of this process: on the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mark() -> Mark:
    """Mark this moment; on a GPU, where it comes among what is still to be computed."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
