"""Short completions first: how far a student may write grows with training, or stays cut.

In a configuration::

    trainer:
      callbacks+:
        class_path: callbacks.Horizon
        init_args: {start: 256, steps: 30, growth: doubling}

To sample long completions is most of what a step costs. Those that are truncated, or begin short
and grow, are a subject of arXiv 2605.31490; that paper was not at hand, and the two ways to grow
are ours. A completion that is cut is the beginning of what it would have been. Validation,
benchmarks, and searches that sample for themselves keep ``model.max_new_tokens``.
"""

from __future__ import annotations

import math
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from opd.errors import UserError
from opd.module import OPDModule
from opd.step import StepRequest


class Horizon(Callback):
    """Limits the completions of step t to so many tokens; a function of t alone.

    Args:
        start: Tokens at the first step.
        end: Tokens from step ``steps`` + 1 on. None: ``model.max_new_tokens``. The same as
            ``start``: all are cut alike.
        steps: Steps before ``end`` is reached.
        growth: ``linear``: by as much each step. ``doubling``: start, 2 start, 4 start, ..., each
            for as many steps.
    """

    def __init__(
        self,
        start: int,
        steps: int,
        end: int | None = None,
        growth: Literal["linear", "doubling"] = "linear",
    ) -> None:
        if start < 1 or steps < 1 or (end is not None and end < start):
            raise UserError(
                f"Horizon(start={start}, end={end}, steps={steps}): start and steps must be at "
                "least 1, end at least start"
            )
        self.start = start
        self.end = end
        self.steps = steps
        self.growth = growth

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look up the end, if it is that of the module.

        Raises:
            UserError: The module samples nothing, or shorter completions than are asked for.
        """
        if not isinstance(pl_module, OPDModule):
            raise UserError(f"Horizon: limits the completions of an OPDModule, not {pl_module}")
        longest = pl_module.sampler.max_new_tokens
        if max(self.start, self.end or 0) > longest:
            raise UserError(
                f"Horizon(start={self.start}, end={self.end}): both must be at most "
                f"model.max_new_tokens={longest}"
            )
        self.end = self.end or longest

    def step_request(self, t: int) -> StepRequest:
        """Ask for the length of step t."""
        assert self.end is not None
        return StepRequest(
            max_new_tokens=length_of(t, self.start, self.end, self.steps, self.growth)
        )


def length_of(
    t: int, start: int, end: int, steps: int, growth: Literal["linear", "doubling"]
) -> int:
    """Return how many tokens a completion of step t may have, t from 1."""
    done = min(t - 1, steps)
    if growth == "linear":
        return start + (end - start) * done // steps
    doublings = math.ceil(math.log2(end / start))
    return min(start << doublings * done // steps, end)
